"""hvd.load_model: saved Keras models, whose optimizers are made distributed ones."""

from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from horovod_powersgd.tensorflow.keras.distributed import DistributedMethods
from horovod_powersgd.tensorflow.keras.optimizer import DistributedOptimizer
from horovod_powersgd.tensorflow.keras_version import KERAS_3


def load_model(
    filepath, custom_optimizers=None, custom_objects=None, compression=horovod.Compression.none, legacy_opts=False
) -> Any:
    """A saved Keras model, with its optimizer, as it was saved, made a distributed one.

    Args:
        filepath: as keras.models.load_model's.
        custom_optimizers: a list of optimizer classes that the model may have been saved with.
        custom_objects: as keras.models.load_model's.
        compression: as DistributedOptimizer's.
        legacy_opts: not needed; the saved model says which optimizer it has.
    """
    custom_objects = {**{cls.__name__: cls for cls in custom_optimizers or ()}, **(custom_objects or {})}
    model = tf.keras.models.load_model(filepath, custom_objects=custom_objects)
    # Custom objects may have made it one already.
    distributed = isinstance(getattr(model.optimizer, "inner_optimizer", model.optimizer), DistributedMethods)
    if model.optimizer is not None and not distributed:
        DistributedOptimizer(model.optimizer, compression=compression)
        if KERAS_3:
            # Keras has compiled it when its optimizer was a plain one.
            model.jit_compile = False
    return model
