"""Memories in 16 bits a number: horovod_powersgd.rounding, in ops."""

import tensorflow as tf

from horovod_powersgd import rounding
from horovod_powersgd.tensorflow import arrays
from horovod_powersgd.tensorflow.graph_function import graph_function


@graph_function
def drawn(key: tf.Tensor, step: tf.Tensor, worker: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor):
    """What is drawn in a step for the rows and for the columns of a matrix, int32.

    Args:
        key, step, worker: as in rounding; int64.
        rows, columns: how many there are, int64.
    """
    of_rows, of_columns = rounding.of_rows_and_columns(arrays, key, rows, columns)
    return of_rows + tf.cast(rounding.of_step(arrays, step, worker), tf.int32), of_columns


@graph_function
def rounded(memory: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor, dtype: str) -> tf.Tensor:
    """rounding.rounded."""
    return rounding.rounded(arrays, memory, dtype, rows, columns)


def unit_of(memory: tf.Tensor) -> tf.Tensor:
    """rounding.unit_of_halves."""
    return rounding.unit_of_halves(arrays, tf.cast(tf.reduce_max(tf.abs(memory)), tf.float32))
