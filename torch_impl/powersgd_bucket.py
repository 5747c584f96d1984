"""Gradients that are exchanged together, as PowerSGD's factors or as they are."""

from collections.abc import Sequence

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.torch.bucket import Bucket, joined
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.orthogonalization import orthogonalize
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient
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
        half_steps = self._start(step)
        matrices = [gradient for gradient in self.gradients if isinstance(gradient, PowerSGDGradient)]
        finite, bases = True, bases_of(matrices)
        for half_step in range(half_steps):
            senders, sent = [], []
            for gradient in matrices if half_step else self.gradients:
                if half_step == 0:
                    yield from self._begin(gradient, step, sparse)
                if gradient not in sparse:
                    senders.append(gradient)
                    sent.append(gradient.multiply(bases[gradient]) if gradient in bases else gradient.send())
            # This worker's last factors are still needed when the mean is there.
            in_place = half_step < half_steps - 1
            finite = (yield from self._average(senders, sent, step, half_step, in_place)) & finite
            if half_step < half_steps - 1:
                bases = bases_of([gradient for gradient in senders if gradient in bases])
        return finite

    def _average(self, senders, sent, step, number, in_place, sizes=()):
        """Bucket._average, of factors perhaps in 8 bits. Their senders come first, each with a tensor of its own; or
        one tensor has them all."""
        if self._family.wire_dtype != "int8":
            return (yield from super()._average(senders, sent, step, number, in_place, sizes))
        matrices = [gradient for gradient in senders if isinstance(gradient, PowerSGDGradient)]
        plain = sent[len(sent) - len(senders) + len(matrices) :]
        mean = self._start_mean(plain, step, number, in_place=True) if plain else None
        finite: bool | torch.Tensor = True
        if matrices:
            rows, flat = tuple(gradient.rows for gradient in matrices), joined(sent[: len(sent) - len(plain)])
            flat, own = yield from self._quantized_mean(flat, rows, f"{self._name}.{number}", step)
            sizes = [count * length for count, length in rows]
            finite = self._received(matrices, flat, sizes)
            for gradient, part in zip(matrices, own.split(sizes)):
                gradient.take_own(part)
        if mean is not None:
            finite = self._received(senders[len(matrices) :], (yield mean), [part.numel() for part in plain]) & finite
        return finite

    def _quantized_mean(self, flat: torch.Tensor, rows: Sequence[tuple[int, int]], name: str, step: Step):
        return quantized_mean(flat, rows, name, Senders(step, self._config))


def bases_of(matrices: Sequence[PowerSGDGradient]) -> dict[PowerSGDGradient, torch.Tensor]:
    """Of the factor that each was last averaged to, or starts from."""
    return dict(zip(matrices, orthogonalize([g.mean for g in matrices], [g.spare for g in matrices])))
