"""Batch normalization over the batches of all workers, for Keras 3; Horovod has it for Keras 2."""

import horovod.tensorflow as horovod
import tensorflow as tf
from horovod.tensorflow.mpi_ops import Average, _allreduce

from horovod_powersgd.tensorflow.keras_version import KERAS_3


class SyncBatchNormalization(tf.keras.layers.BatchNormalization):
    """BatchNormalization whose mean and variance in training are those of all workers' batches, of one size each.

    Args:
        fused: False, as in Keras 2.
        kwargs: BatchNormalization's.

    Raises:
        ValueError: fused is true.
    """

    def __init__(self, fused=False, **kwargs) -> None:
        if fused:
            raise ValueError("SyncBatchNormalization does not support fused=True.")
        super().__init__(**kwargs)

    def _moments(self, inputs, mask):
        mean, variance = super()._moments(inputs, mask)
        if horovod.size() == 1:
            return mean, variance
        # Var[X] = E[X^2] - E[X]^2
        moments = _allreduce(tf.stack([mean, variance + tf.square(mean)]), op=Average)
        mean, mean_of_squares = tf.unstack(moments)
        return mean, mean_of_squares - tf.square(mean)


if not KERAS_3:
    # Type checkers refuse to assign to the name of a class.
    globals()["SyncBatchNormalization"] = horovod.SyncBatchNormalization
