"""What Keras's own classes have to know of distributed optimizers: its loss scaling, and its choice of XLA."""

import tensorflow as tf

from horovod_powersgd.tensorflow.keras.compilation import interpret_distributed_models
from horovod_powersgd.tensorflow.keras.loss_scaling import (
    average_after_unscaling,
    average_before_apply,
    loss_scale_optimizers,
)
from horovod_powersgd.tensorflow.keras_version import KERAS_3


def patch_keras() -> None:
    """Changes the classes, once in a process. What they do without a distributed optimizer stays what it was."""
    for cls in loss_scale_optimizers():
        (average_before_apply if KERAS_3 else average_after_unscaling)(cls)
    if KERAS_3:
        interpret_distributed_models(tf.keras.Model)
