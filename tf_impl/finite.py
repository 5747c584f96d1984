"""Whether a step's numbers are finite, and what becomes of those that are not."""

from collections.abc import Sequence

import tensorflow as tf

from horovod_powersgd.tensorflow.graph_function import graph_function


def all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether all their floats are finite."""
    return all_of([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors if tensor.dtype.is_floating])


def all_of(conditions: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether all of these scalars are true."""
    if len(conditions) == 1:
        return conditions[0]
    return tf.reduce_all(tf.stack(conditions)) if conditions else tf.constant(True)


@graph_function
def zeros_unless(condition: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """The tensor where the condition holds, else as many zeros."""
    return tf.cond(condition, lambda: tensor, lambda: tf.zeros_like(tensor))


def marked(tensor: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
    """The tensor; NaN where `finite`, a boolean, is false."""
    found = _marked(tensor, finite)
    found.set_shape(tensor.shape)
    return found


@graph_function
def _marked(tensor, finite):
    # Where all is well no NaN is computed, nor constant: tf.debugging.enable_check_numerics would tell of it.
    return tf.cond(finite, lambda: tensor, lambda: tensor + tf.math.log(tf.cast(finite, tensor.dtype) - 1))
