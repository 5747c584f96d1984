"""What was kept before a step, so that the step can be discarded."""

from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from horovod_powersgd.tensorflow.variable import make_variable


class Snapshot:
    """Copies of variables, in memory of their size."""

    def __init__(self, variables: Iterable[tf.Variable]):
        self._copies = [(variable, _like(variable)) for variable in variables]

    def copy_of(self, variable: tf.Variable) -> tf.Variable:
        """What it was before, in a variable."""
        return next(copy for original, copy in self._copies if original is variable)

    def take(self) -> list[tf.Operation]:
        """The ops that copy the variables as they are."""
        return [copy.assign(tf.convert_to_tensor(variable), read_value=False) for variable, copy in self._copies]

    def restore(self) -> list[tf.Operation]:
        """The ops that set the variables back."""
        return [variable.assign(tf.convert_to_tensor(copy), read_value=False) for variable, copy in self._copies]


def _like(variable: tf.Variable) -> tf.Variable:
    with tf.device(variable.device):
        return make_variable(
            np.zeros([side or 0 for side in variable.shape], variable.dtype.as_numpy_dtype), variable.shape
        )
