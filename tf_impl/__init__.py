"""horovod.tensorflow with compressors: everything that it exports, and a tape and an optimizer that compress.

    import horovod_powersgd.tensorflow as hvd       # was: import horovod.tensorflow as hvd
"""

from horovod_powersgd.environment.horovod_import import require_horovod

require_horovod("tensorflow")

import functools
from typing import Any

import horovod.tensorflow
from horovod.tensorflow import *
from horovod.tensorflow import mpi_ops
from tensorflow.python.eager import context

# Not "from ... import elastic": that would find Horovod's, which the line above has brought.
import horovod_powersgd.tensorflow.elastic
from horovod_powersgd import *
from horovod_powersgd import activation, launcher
from horovod_powersgd.arguments import without_compressors
from horovod_powersgd.tensorflow.agreement import new_generation
from horovod_powersgd.tensorflow.compression_state import (
    CompressionState as CompressionState,
    compression_state_dict as compression_state_dict,
    compression_stats as compression_stats,
    forget_compression as forget_compression,
    load_compression_state_dict as load_compression_state_dict,
)
from horovod_powersgd.tensorflow.normalization import SyncBatchNormalization as SyncBatchNormalization
from horovod_powersgd.tensorflow.optimizer import DistributedOptimizer as DistributedOptimizer
from horovod_powersgd.tensorflow.replicas import (
    assert_replicas_equal as assert_replicas_equal,
    broadcast_variables as broadcast_variables,
)
from horovod_powersgd.tensorflow.tape import (
    DistributedGradientTape as DistributedGradientTape,
    PartialDistributedGradientTape as PartialDistributedGradientTape,
)


# Of mpi_ops, since in horovod.tensorflow these can be the ones below: activate() puts them there.
@functools.wraps(mpi_ops.init)
def init(*args, **kwargs):
    launcher.careful_init(mpi_ops)(*args, **kwargs)
    new_generation()


@functools.wraps(mpi_ops.join)
def join(*args, **kwargs):
    # TensorFlow takes Horovod's op, which has no inputs, for a constant, and would not run it a second time.
    context.context().clear_kernel_cache()
    last = mpi_ops.join(*args, **kwargs)
    new_generation()
    return last


allreduce = without_compressors(horovod.tensorflow.allreduce)
grouped_allreduce = without_compressors(horovod.tensorflow.grouped_allreduce)
reducescatter = without_compressors(horovod.tensorflow.reducescatter)
grouped_reducescatter = without_compressors(horovod.tensorflow.grouped_reducescatter)
activate, deactivate = activation.TENSORFLOW.activate, activation.TENSORFLOW.deactivate


def __getattr__(name: str) -> Any:
    # Horovod's private names, which its users' tests use.
    return getattr(horovod.tensorflow, name)


activation.TENSORFLOW.ready(__name__)
