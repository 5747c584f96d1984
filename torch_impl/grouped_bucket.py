"""PowerSGD on a GPU."""

from collections.abc import Sequence

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.gradient import Copies, PlainGradient
from horovod_powersgd.torch.grouped_kernels import half_steps, keep_all, orthogonalize, products
from horovod_powersgd.torch.half_memory import HalfMemory, Keep, keep
from horovod_powersgd.torch.powersgd_bucket import PowerSGDBucket
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient
from horovod_powersgd.torch.profiling import profiled
from horovod_powersgd.torch.step import Step
from horovod_powersgd.torch.workers import Workers


class GroupedBucket(PowerSGDBucket):
    """A PowerSGDBucket that asks the device once for what it does to all its gradients, when they are there: asking
    takes longer than doing. The messages are the same."""

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers, config: Compressor):
        super().__init__(name, gradients, workers, config)
        # Whether something that is not finite has come, as 0 or 1; and what PyTorch multiplies while it looks.
        self._found = torch.zeros(1, device=gradients[0].parameter.device)
        self._one = torch.ones_like(self._found)

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        half_step_count = self._start(step)
        self._found.zero_()
        for gradient in self.gradients:
            yield from self._begin(gradient, step, sparse)
        dense = [gradient for gradient in self.gradients if gradient not in sparse]
        matrices = [gradient for gradient in dense if isinstance(gradient, PowerSGDGradient)]
        if not matrices:
            return (yield from self._average(dense, [g.send() for g in dense], step, 0, in_place=True))
        dtype = matrices[0].factor_dtype
        for half_step in range(half_step_count):
            with profiled("orthogonalize"):
                bases = orthogonalize([g.mean for g in matrices], [g.spare() for g in matrices])
            with profiled("p" if matrices[0].mean_is_q else "q"):
                tasks = [gradient.half_step(basis) for gradient, basis in zip(matrices, bases)]
                own = half_steps(tasks, dtype)
            sizes = [len(basis) * delta.shape[makes_q] for delta, basis, makes_q, *_ in tasks]
            for gradient, part in zip(matrices, own.split(sizes)):
                gradient.made(part)
            vectors = [] if half_step else [gradient.send() for gradient in dense[len(matrices) :]]
            sizes += [vector.numel() for vector in vectors]
            senders, in_place = matrices if half_step else dense, half_step < half_step_count - 1
            # Of all averages so far.
            finite = yield from self._average(senders, [own, *vectors], step, half_step, in_place, sizes)
        return finite

    def _is_finite(self, flat: torch.Tensor) -> torch.Tensor:
        torch._amp_foreach_non_finite_check_and_unscale_([flat], self._found, self._one)
        return (self._found == 0).view(())

    def _end(self, finite: bool, step: Step, copies: Copies) -> None:
        matrices = [g for g in self.gradients if isinstance(g, PowerSGDGradient) and not g.is_sparse]
        if not (finite and matrices):
            return super()._end(finite, step, copies)
        memories: list[Keep] = []

        def keep_together(task: Keep) -> HalfMemory:
            if task.halves.dtype != torch.bfloat16:
                return keep(task)
            memories.append(task)
            return HalfMemory(task.halves, torch.float32)

        updates = [gradient.update(finite, step.factor, step.undoable, keep_together) for gradient in matrices]
        with profiled("update"):
            if memories:
                keep_all(memories)
            products(updates)
        for matrix, update in zip(matrices, updates):
            matrix.put_update(update, finite, step.factor, copies)
        for gradient in self.gradients:
            if gradient.is_sparse or not gradient.compressed:
                gradient.end(finite, step.factor, step.undoable, copies)
