"""horovod.torch with PowerSGD: everything that it exports, and a DistributedOptimizer that compresses.

    import horovod_powersgd.torch as hvd            # was: import horovod.torch as hvd
"""

from horovod_powersgd.environment.horovod_import import require_horovod

require_horovod("torch")

from typing import TYPE_CHECKING, Any

import horovod.torch
from horovod.torch import *

# Not "from ... import elastic": that would find Horovod's, which the line above has brought.
import horovod_powersgd.torch.elastic
from horovod_powersgd import *
from horovod_powersgd import activation, launcher
from horovod_powersgd.arguments import without_compressors
from horovod_powersgd.torch.error_feedback_sgd import ErrorFeedbackSGD as ErrorFeedbackSGD
from horovod_powersgd.torch.generation import join as join
from horovod_powersgd.torch.loss_scaling import synchronize_before_unscaling
from horovod_powersgd.torch.optimizer import DistributedOptimizer as DistributedOptimizer
from horovod_powersgd.torch.replicas import (
    assert_replicas_equal as assert_replicas_equal,
    broadcast_optimizer_state as broadcast_optimizer_state,
    broadcast_parameters as broadcast_parameters,
)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What Horovod exports, which comes without types."""


synchronize_before_unscaling()
init = launcher.careful_init(horovod.torch.mpi_ops)
allreduce = without_compressors(horovod.torch.allreduce)
grouped_allreduce = without_compressors(horovod.torch.grouped_allreduce)
activate, deactivate = activation.TORCH.activate, activation.TORCH.deactivate
activation.TORCH.ready(__name__)
