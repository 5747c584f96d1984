"""horovod.tensorflow.keras with compressors, for Keras 3 and, with TF_USE_LEGACY_KERAS=1, for Keras 2 (tf_keras).

    import horovod_powersgd.tensorflow.keras as hvd     # was: import horovod.tensorflow.keras as hvd
"""

from tensorflow import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"Keras computes with {keras.backend.backend()} here, and Horovod averages the gradients of TensorFlow. Set "
        "KERAS_BACKEND=tensorflow in the environment of all workers, or in ~/.keras/keras.json"
    )

from horovod.tensorflow.keras import *  # noqa: E402, F401, F403

# Not "from ... import callbacks": that would find Horovod's, which the line above has brought.
import horovod_powersgd.tensorflow.keras.callbacks  # noqa: E402
import horovod_powersgd.tensorflow.keras.elastic  # noqa: E402, F401
from horovod_powersgd import *  # noqa: E402, F401, F403
from horovod_powersgd.tensorflow import CompressionState, assert_replicas_equal, init  # noqa: E402, F401
from horovod_powersgd.tensorflow.keras.error_feedback_sgd import ErrorFeedbackSGD  # noqa: E402, F401
from horovod_powersgd.tensorflow.keras.optimizer import (  # noqa: E402, F401
    DistributedOptimizer,
    PartialDistributedOptimizer,
    load_model,
)
from horovod_powersgd.tensorflow.keras.patches import patch_keras  # noqa: E402

patch_keras()
