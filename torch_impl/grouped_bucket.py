"""PowerSGD on a GPU."""

from collections.abc import Sequence

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.torch.gradient import Copies, PlainGradient
from horovod_powersgd.torch.grouped_kernels import half_steps, keep_all, orthogonalize, products
from horovod_powersgd.torch.half_memory import HalfMemory, Keep, keep
from horovod_powersgd.torch.kernels import HalfStep, Product
from horovod_powersgd.torch.powersgd_bucket import PowerSGDBucket, update_all
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient
from horovod_powersgd.torch.profiling import profiled
from horovod_powersgd.torch.step import Step
from horovod_powersgd.torch.workers import Workers


class GroupedBucket(PowerSGDBucket):
    """A PowerSGDBucket whose passes are kernels for GPUs, orthogonalization, too, each over all its matrices: to ask
    for a pass takes longer than the pass. The messages are the same."""

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers, config: Compressor):
        super().__init__(name, gradients, workers, config)
        # Whether something that is not finite has come, as 0 or 1; and what PyTorch multiplies while it looks.
        self._found = torch.zeros(1, device=gradients[0].parameter.device)
        self._one = torch.ones_like(self._found)

    def _start(self, step: Step) -> int:
        self._found.zero_()
        return super()._start(step)

    def _bases(self, matrices: Sequence[PowerSGDGradient]) -> list[torch.Tensor]:
        with profiled("orthogonalize"):
            return orthogonalize([g.mean for g in matrices], [g.spare() for g in matrices])

    def _half_steps(self, tasks: Sequence[HalfStep], in_halves: bool) -> torch.Tensor:
        return half_steps(tasks, torch.float16 if in_halves else torch.float32)

    def _is_finite(self, flat: torch.Tensor) -> torch.Tensor:
        """Whether it and all averages before it are."""
        torch._amp_foreach_non_finite_check_and_unscale_([flat], self._found, self._one)
        return (self._found == 0).view(())

    def _update(self, matrices: Sequence[PowerSGDGradient], step: Step, copies: Copies) -> None:
        memories: list[Keep] = []

        def keep_together(task: Keep) -> HalfMemory:
            if task.halves.dtype != torch.bfloat16:
                return keep(task)
            memories.append(task)
            return HalfMemory(task.halves, torch.float32)

        def write(updates: Sequence[Product]) -> None:
            if memories:
                keep_all(memories)
            products(updates)

        update_all(matrices, step, copies, keep_together, write)
