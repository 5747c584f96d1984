"""Whether anybody changes gradients while they are exchanged, or afterwards."""

from collections.abc import Iterable, Sequence

import torch

from horovod_powersgd.torch.clipping import factors_of
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.ownership import owns_storage


class GradientWatch:
    """The gradients of a step as they were noted, with the versions that PyTorch counts of them."""

    def __init__(self):
        self._noted: dict[torch.nn.Parameter, tuple[torch.Tensor, int | None]] = {}

    def note(self, parameter: torch.nn.Parameter, incoming: torch.Tensor | None = None) -> None:
        """Notes a gradient as it is: from now on nobody is to change it before the exchange has ended.

        Args:
            parameter: whose gradient it is.
            incoming: what backward has handed over, while the hook runs that was called with it.
        """
        gradient = parameter.grad
        assert gradient is not None
        if not gradient.is_sparse and 0 in gradient.stride() and gradient.numel() > 1:
            # An expanded tensor has no room for what its elements are going to be.
            gradient = parameter.grad = gradient.contiguous()
        # Tensors that have memory in common can have their versions in common, too.
        tells = gradient.is_sparse or owns_storage(gradient, incoming)
        self._noted[parameter] = gradient, gradient._version if tells else None

    def _is_known(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the gradient is certainly as it was noted."""
        gradient, version = self._noted[parameter]
        return parameter.grad is gradient and gradient._version == version

    def _is_changed(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the gradient is certainly not as it was noted."""
        gradient, version = self._noted[parameter]
        return parameter.grad is not gradient or version not in (None, gradient._version)

    def is_replaced(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter has another gradient than the noted one."""
        return parameter.grad is not self._noted[parameter][0]

    def changes(self, gradients: Iterable[PlainGradient]) -> str | None:
        """What to say where gradients were changed since they were noted; None where they were not."""
        changed = [gradient for gradient in gradients if self._is_changed(gradient.parameter)]
        for gradient in changed:
            gradient.make_zero()  # for the other workers, which cannot know
        if not changed:
            return None
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return (
            f"The gradient of {', '.join(gradient.name for gradient in changed[:3])}{more} was changed while it was "
            "exchanged: call synchronize() first, then change it, then step() inside skip_synchronize()"
        )

    def clipping(
        self, gradients: Sequence[PlainGradient], unscaled: float | torch.Tensor
    ) -> dict[PlainGradient, float]:
        """What each update was clipped to, between 0 and 1, since the exchange has ended.

        Args:
            gradients: of the step.
            unscaled: what all of them were multiplied by, which is no clipping.
        """
        samples = {}
        for gradient in gradients:
            sample = None if self._is_known(gradient.parameter) else gradient.sample()
            if sample is not None:
                samples[gradient] = sample
        factors = dict.fromkeys(gradients, 1.0)
        divisor = float(unscaled) if samples else 1.0
        for gradient, factor in zip(samples, factors_of(list(samples.values()))):
            factors[gradient] = min(factor / divisor, 1.0)
        return factors

    def clear(self) -> None:
        """Forgets all."""
        self._noted.clear()
