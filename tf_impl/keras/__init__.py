"""horovod.tensorflow.keras with compressors, for Keras 3 and, with TF_USE_LEGACY_KERAS=1, for Keras 2 (tf_keras).

    import horovod_powersgd.tensorflow.keras as hvd     # was: import horovod.tensorflow.keras as hvd
"""

from horovod.tensorflow.keras import *  # noqa: F401, F403

# Not "from ... import callbacks": that would find Horovod's, which the line above has brought.
import horovod_powersgd.tensorflow.keras.callbacks
import horovod_powersgd.tensorflow.keras.elastic  # noqa: F401
from horovod_powersgd import (  # noqa: F401
    Accordion,
    Allgather,
    AllreduceMean,
    Atomo,
    BestRank,
    Custom,
    Float16,
    GradiVeq,
    NoCompression,
    PowerSGD,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    TopK,
    UnbiasedRank,
)
from horovod_powersgd.tensorflow import CompressionState, assert_replicas_equal, init  # noqa: F401
from horovod_powersgd.tensorflow.keras.error_feedback_sgd import ErrorFeedbackSGD  # noqa: F401
from horovod_powersgd.tensorflow.keras.optimizer import (  # noqa: F401
    DistributedOptimizer,
    PartialDistributedOptimizer,
    load_model,
)
