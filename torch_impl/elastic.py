"""horovod.torch.elastic, with a TorchState that leaves the workers' replicas equal.

The factors of PowerSGD need no care: the workers of a new generation agree on them before their first exchange.
"""

from horovod.torch.elastic import *  # noqa: F401, F403
from horovod.torch.elastic import TorchState as _TorchState
from horovod.torch.elastic.state import ModelStateHandler, OptimizerStateHandler

from horovod_powersgd.torch.replicas import broadcast_optimizer_state, broadcast_parameters


class TorchState(_TorchState):
    """Horovod's TorchState, whose sync takes no step: Horovod's applies weight decay to the workers that are new."""

    def sync(self) -> None:
        """Gives all workers worker 0's models, optimizers and attributes."""
        for handler in self._handlers.values():
            if type(handler) is ModelStateHandler:
                broadcast_parameters(handler.value.state_dict(), root_rank=0)
            elif type(handler) is OptimizerStateHandler:
                broadcast_optimizer_state(handler.value, root_rank=0)
            else:
                handler.sync()
        super(_TorchState, self).sync()
