"""horovod.keras.callbacks: those of horovod_powersgd.tensorflow.keras.callbacks."""

from horovod_powersgd.tensorflow.keras.callbacks import *  # noqa: F401, F403
