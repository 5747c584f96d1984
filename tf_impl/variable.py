"""The variables that are kept beside the model's."""

import re
from typing import TypeAlias

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

# A variable, and the value that it is to be given.
Assignment: TypeAlias = tuple[tf.Variable, tf.Tensor]


def make_variable(value, shape: tuple | None = None) -> tf.Variable:
    """A variable beside the model's: not trained, and in no collection. Outlives the function that is being traced."""
    shape = np.shape(value) if shape is None else shape
    with tf.init_scope():
        if tf.executing_eagerly():
            # Not tf.Variable: a tf.function that is traced again lets none be made, for fear that each trace makes one.
            return ResourceVariable(value, trainable=False, shape=tf.TensorShape(shape))
        return tf.compat.v1.Variable(
            value, trainable=False, collections=[], use_resource=True, shape=tf.TensorShape(shape)
        )


def native(variable) -> tf.Variable:
    """The tf.Variable of a Keras 3 variable, and any other itself."""
    return variable.value if hasattr(variable, "path") and hasattr(variable, "value") else variable


def plain_name(name: str) -> str:
    """What is the same on all workers of a Keras variable's name: not the layers that it belongs to, which Keras counts
    from the first that a process makes, and names anew when it loads a model."""
    return re.sub(r"_\d+$", "", name.rpartition("/")[2])
