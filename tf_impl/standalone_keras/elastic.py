"""horovod.keras.elastic: horovod_powersgd.tensorflow.keras.elastic."""

from horovod_powersgd.tensorflow.elastic import TensorFlowKerasState  # noqa: F401
from horovod_powersgd.tensorflow.keras.elastic import *  # noqa: F401, F403
