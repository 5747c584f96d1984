"""horovod.torch with PowerSGD: everything that it exports, and a DistributedOptimizer that compresses.

    import horovod_powersgd.torch as hvd            # was: import horovod.torch as hvd
"""

from horovod_powersgd.environment.installation import require_horovod

require_horovod("torch")

import horovod.torch  # noqa: E402
from horovod.torch import *  # noqa: E402, F401, F403

# Not "from ... import elastic": that would find Horovod's, which the line above has brought.
import horovod_powersgd.torch.elastic  # noqa: E402, F401
from horovod_powersgd import *  # noqa: E402, F401, F403
from horovod_powersgd import launcher  # noqa: E402
from horovod_powersgd.arguments import without_compressors  # noqa: E402
from horovod_powersgd.torch.error_feedback_sgd import ErrorFeedbackSGD  # noqa: E402, F401
from horovod_powersgd.torch.generation import join  # noqa: E402, F401
from horovod_powersgd.torch.loss_scaling import synchronize_before_unscaling  # noqa: E402
from horovod_powersgd.torch.optimizer import DistributedOptimizer  # noqa: E402, F401
from horovod_powersgd.torch.replicas import (  # noqa: E402, F401
    assert_replicas_equal,
    broadcast_optimizer_state,
    broadcast_parameters,
)

synchronize_before_unscaling()
init = launcher.careful_init(horovod.torch)
allreduce = without_compressors(horovod.torch.allreduce)
grouped_allreduce = without_compressors(horovod.torch.grouped_allreduce)
