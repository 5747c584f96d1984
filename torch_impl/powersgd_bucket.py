"""Gradients that are exchanged together, as PowerSGD's factors or as they are."""

from collections.abc import Callable, Sequence

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.torch.bucket import Bucket, joined
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.gradient import Copies, PlainGradient
from horovod_powersgd.torch.half_memory import Keep, keep
from horovod_powersgd.torch.kernels import HalfStep, Memory, Product, half_steps, products
from horovod_powersgd.torch.orthogonalization import orthogonalize
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient
from horovod_powersgd.torch.profiling import profiled
from horovod_powersgd.torch.quantization import quantized_mean
from horovod_powersgd.torch.senders import Senders
from horovod_powersgd.torch.step import Step
from horovod_powersgd.torch.workers import Workers


class PowerSGDBucket(Bucket):
    """Gradients whose half-steps go together, one flat tensor in each: the matrices come first, and what is averaged as
    it is travels with their first half-step."""

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers, config: Compressor):
        assert isinstance(config.family, PowerSGD)
        self._family = config.family
        super().__init__(name, gradients, workers, config)
        self.gradients = sorted(gradients, key=lambda gradient: not gradient.compressed)

    @property
    def _worker(self) -> int:
        """This one's number; in two levels, its host's."""
        return self._workers.index

    def _start(self, step: Step) -> int:
        """Begins a step of all matrices; returns how many half-steps it has."""
        renews = self._family.renews(step.number)
        for gradient in self.gradients:
            if isinstance(gradient, PowerSGDGradient):
                gradient.start(step.number, renews, step.rates.get(gradient.parameter), self._worker)
        return self._family.half_steps(renews)

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        half_step_count = self._start(step)
        dense = yield from self._begin(self.gradients, step, sparse)
        matrices = _matrices_of(dense)
        if not matrices:
            return (yield from self._average(dense, [g.send() for g in dense], step, 0, in_place=True))
        finite: list[torch.Tensor] = []
        for half_step in range(half_step_count):
            own, sizes = self._multiply(matrices)
            vectors = [] if half_step else [gradient.send() for gradient in dense[len(matrices) :]]
            sizes += [vector.numel() for vector in vectors]
            # This worker's last factors are still needed when the mean is there.
            senders, in_place = matrices if half_step else dense, half_step < half_step_count - 1
            finite += yield from self._average(senders, [own, *vectors], step, half_step, in_place, sizes)
        return finite

    def _multiply(self, matrices: Sequence[PowerSGDGradient]) -> tuple[torch.Tensor, list[int]]:
        """A half-step: this worker's factors, flat, one after the other; and their sizes."""
        bases = self._bases(matrices)
        with profiled("p" if matrices[0].mean_is_q else "q"):
            tasks = [gradient.half_step(basis) for gradient, basis in zip(matrices, bases)]
            own, sizes = self._half_steps(tasks, matrices[0].sends_halves), [task.size for task in tasks]
        for gradient, part in zip(matrices, own.split(sizes)):
            gradient.made(part)
        return own, sizes

    def _bases(self, matrices: Sequence[PowerSGDGradient]) -> list[torch.Tensor]:
        """Of the factor that each was last averaged to, or starts from."""
        return orthogonalize([g.mean for g in matrices], [g.spare for g in matrices])

    def _half_steps(self, tasks: Sequence[HalfStep], in_halves: bool) -> torch.Tensor:
        factors = half_steps(tasks)
        return factors.half() if in_halves else factors

    def _average(self, senders, sent, step, number, in_place, sizes=()):
        """Bucket._average, of factors perhaps in 8 bits. Their senders come first, each with a tensor of its own; or
        one tensor has them all."""
        if self._family.wire_dtype != "int8":
            return (yield from super()._average(senders, sent, step, number, in_place, sizes))
        matrices = _matrices_of(senders)
        plain = sent[len(sent) - len(senders) + len(matrices) :]
        mean = self._start_mean(plain, step, number, in_place=True) if plain else None
        finite: list[torch.Tensor] = []
        if matrices:
            rows, flat = tuple(gradient.rows for gradient in matrices), joined(sent[: len(sent) - len(plain)])
            flat, own = yield from self._quantized_mean(flat, rows, f"{self._name}.{number}", step)
            sizes = [count * length for count, length in rows]
            finite.append(self._received(matrices, flat, sizes))
            for gradient, part in zip(matrices, own.split(sizes)):
                gradient.take_own(part)
        if mean is not None:
            finite.append(self._received(senders[len(matrices) :], (yield mean), [part.numel() for part in plain]))
        return finite

    def _quantized_mean(self, flat: torch.Tensor, rows: Sequence[tuple[int, int]], name: str, step: Step):
        return quantized_mean(flat, rows, name, Senders(step, self._config))

    def _end(self, finite: bool, step: Step, copies: Copies) -> None:
        matrices = [gradient for gradient in _matrices_of(self.gradients) if finite and not gradient.is_sparse]
        if matrices:
            self._update(matrices, step, copies)
        for gradient in self.gradients:
            if not (finite and gradient.compressed) or gradient.is_sparse:
                gradient.end(finite, step.factor, step.undoable, copies)

    def _update(self, matrices: Sequence[PowerSGDGradient], step: Step, copies: Copies) -> None:
        """Ends these matrices' exchange, which is finite."""
        # One by one where each is read for a memory in 16 bits, and is written over while it is in the cache.
        for some in [matrices] if self._family.memory_dtype is None else [[matrix] for matrix in matrices]:
            update_all(some, step, copies, keep, products)


def update_all(
    matrices: Sequence[PowerSGDGradient],
    step: Step,
    copies: Copies,
    keep: Callable[[Keep], Memory],
    write: Callable[[Sequence[Product]], None],
) -> None:
    """Writes the updates of a finite step, all at once, and puts them into the gradients.

    Args:
        keep: as of PowerSGDGradient.update.
        write: writes the updates.
    """
    updates = [gradient.update(True, step.factor, step.undoable, keep) for gradient in matrices]
    with profiled("update"):
        write(updates)
    for gradient, update in zip(matrices, updates):
        gradient.put_update(update, True, step.factor, copies)


def _matrices_of(gradients: Sequence[PlainGradient]) -> list[PowerSGDGradient]:
    return [gradient for gradient in gradients if isinstance(gradient, PowerSGDGradient)]
