"""In which order one function runs the exchanges of one name."""

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from horovod_powersgd.tensorflow.variable import make_variable


class Order:
    """Exchanges of one name in one function read a variable when they begin, and change it when they end: so TensorFlow
    lets one come after the other.

    Args:
        name: of the exchanges.
        in_session: whether they are in a graph of TensorFlow 1, which orders nothing.
    """

    def __init__(self, name: str, in_session: bool):
        self._name, self._in_session = name, in_session

    def begin(self) -> tf.Tensor:
        """What an exchange has to wait for."""
        return tf.convert_to_tensor(_ended(self._name))

    def end(self, done: Sequence) -> tf.Operation:
        """Lets the next exchange of that name begin after what is done."""
        with tf.control_dependencies(done):
            return tf.no_op() if self._in_session else tf.group(_ended(self._name).assign_add(1, read_value=False))


@functools.cache
def _ended(name: str) -> tf.Variable:
    """How many have ended."""
    return make_variable(np.int64(0))
