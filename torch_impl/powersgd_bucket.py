"""Gradients that are exchanged together, as PowerSGD's factors or as they are."""

from typing import Dict, Sequence

import torch

from horovod_powersgd.torch.bucket import Bucket
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.orthogonalization import orthogonalize
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient
from horovod_powersgd.torch.step import Step


class PowerSGDBucket(Bucket):
    """Gradients whose half-steps go together, a flat tensor in each; those that are averaged as they are travel with
    the first."""

    def _rounds(self, step: Step, sparse: Dict[PlainGradient, SparseMean]):
        matrices = [gradient for gradient in self.gradients if gradient.compressed]
        renews = self._config.family.renews(step.number)
        half_steps = self._config.family.half_steps(renews)
        for gradient in matrices:
            gradient.start(step.number, renews, step.rates.get(gradient.parameter))
        finite, bases = True, _bases(matrices)
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
                bases = _bases([gradient for gradient in senders if gradient in bases])
        return finite


def _bases(matrices: Sequence[PowerSGDGradient]) -> Dict[PowerSGDGradient, torch.Tensor]:
    """Of the factor that each was last averaged to, or starts from."""
    return dict(zip(matrices, orthogonalize([g.mean for g in matrices], [g.spare for g in matrices])))
