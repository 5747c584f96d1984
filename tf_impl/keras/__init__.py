"""horovod.tensorflow.keras with compressors, for Keras 3 and, with TF_USE_LEGACY_KERAS=1, for Keras 2 (tf_keras).

    import horovod_powersgd.tensorflow.keras as hvd     # was: import horovod.tensorflow.keras as hvd
"""

from typing import TYPE_CHECKING, Any

from tensorflow import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"Keras computes with {keras.backend.backend()} here, and Horovod averages the gradients of TensorFlow. Set "
        "KERAS_BACKEND=tensorflow in the environment of all workers, or in ~/.keras/keras.json"
    )

from horovod.tensorflow.keras import *

# Not "from ... import callbacks": that would find Horovod's, which the line above has brought.
import horovod_powersgd.tensorflow.keras.callbacks
import horovod_powersgd.tensorflow.keras.elastic
from horovod_powersgd import *
from horovod_powersgd import activation
from horovod_powersgd.tensorflow import (
    CompressionState as CompressionState,
    activate as activate,
    assert_replicas_equal as assert_replicas_equal,
    deactivate as deactivate,
    init as init,
)
from horovod_powersgd.tensorflow.keras.error_feedback_sgd import ErrorFeedbackSGD as ErrorFeedbackSGD
from horovod_powersgd.tensorflow.keras.optimizer import (
    DistributedOptimizer as DistributedOptimizer,
    PartialDistributedOptimizer as PartialDistributedOptimizer,
)
from horovod_powersgd.tensorflow.keras.patches import patch_keras
from horovod_powersgd.tensorflow.keras.saved_model import load_model as load_model

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What Horovod exports, which comes without types."""


patch_keras()
activation.TENSORFLOW.ready(__name__)
