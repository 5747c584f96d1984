"""hvd.DistributedOptimizer that takes a PowerSGD."""

import itertools
from collections import defaultdict

import horovod.torch.optimizer as horovod_optimizer
import torch
from horovod.torch.compression import Compression
from horovod.torch.mpi_ops import Adasum, Average, ProcessSet, Sum, global_process_set

from horovod_powersgd import PowerSGD
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.torch.workers import Workers
from horovod_powersgd.torch.engine import Engine

_Horovod = horovod_optimizer._DistributedOptimizer

# Counts the optimizers of each process set, on every worker alike, so that their tensors' names differ.
_numbers = defaultdict(itertools.count)


class _PowerSGDOptimizer(_Horovod):
    """Horovod's hooks, with the gradients handed to an engine in place of allreduce.

    Horovod's methods say super(self.__class__, self), so the class of an optimizer is made, as Horovod makes its
    own, by putting these methods and Horovod's into a direct subclass of the wrapped optimizer's class.
    """

    def __init__(self, params, named_parameters, compression, *args, **kwargs):
        _Horovod.__init__(self, params, named_parameters, compression, *args, **kwargs)
        if self.process_set.included() and not self._grad_accs:
            # Horovod registers none for one worker, but compression changes what one worker learns, too.
            self._register_hooks()

    def _register_hooks(self):
        groups, self._groups = self._groups, None
        workers = Workers(
            process_set=self.process_set,
            prefix=f"powersgd.{next(_numbers[self.process_set.process_set_id])}",
            predivide_factor=self.gradient_predivide_factor,
        )
        parameters = [
            (self._parameter_names[p], p) for group in self.param_groups for p in group["params"] if p.requires_grad
        ]
        self._engine = Engine(parameters, self._compression, workers, self.op == Sum, groups)
        _Horovod._register_hooks(self)

    def _allreduce_grad_async(self, p):
        self._engine.arrived(p)
        return self._engine, None

    def synchronize(self):
        """Waits until the updates of all workers stand in the gradients.

        Raises:
            HorovodInternalError: a worker was lost.
        """
        if self.process_set.included():
            try:
                self._engine.finish()
            finally:
                self._handles.clear()
                self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized = True

    def load_state_dict(self, *args, **kwargs):
        if self.process_set.included():
            self._engine.reset()
        _Horovod.load_state_dict(self, *args, **kwargs)

    def compression_stats(self) -> CompressionStats:
        """What compression did in the last step and in all steps so far, for this worker."""
        return self._engine.stats()


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters=None,
    compression=Compression.none,
    backward_passes_per_step: int = 1,
    op=Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups=None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
):
    """horovod.torch.DistributedOptimizer, whose compression can also be a PowerSGD.

    Args:
        optimizer: to wrap. The result is an instance of its class.
        named_parameters: (name, parameter) of all its parameters, usually model.named_parameters(). A parameter's
            name chooses its starting Q.
        compression: a horovod_powersgd.PowerSGD, or Compression.none or .fp16, with which this is Horovod's own.
        (the others): as Horovod's.

    Raises:
        ValueError: PowerSGD with op=Adasum, or what Horovod refuses.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
        ...                                      compression=hvd.PowerSGD(rank=4))
    """
    arguments = dict(
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    if not isinstance(compression, PowerSGD):
        if not hasattr(compression, "decompress"):
            raise TypeError(
                "compression must be hvd.Compression.none, hvd.Compression.fp16 or a hvd.PowerSGD(...), "
                f"not {compression!r}"
            )
        return horovod_optimizer.DistributedOptimizer(
            optimizer, named_parameters, compression, num_groups=num_groups, **arguments
        )
    if op not in (Average, Sum):
        raise ValueError("PowerSGD averages or sums gradients: op must be hvd.Average or hvd.Sum (Adasum is neither)")
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if num_groups != 0 and groups is None:
        arguments["groups"] = num_groups
    base = optimizer.__class__
    cls = type(base.__name__, (base,), {**vars(_Horovod), **vars(_PowerSGDOptimizer), "__module__": _Horovod.__module__})
    return cls(optimizer.param_groups, named_parameters, compression, **arguments)
