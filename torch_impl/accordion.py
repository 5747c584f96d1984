"""What Accordion decides for one gradient, from step to step."""

from collections.abc import Mapping

import torch

from horovod_powersgd.compressors.accordion import Accordion, Regime
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.layout import Layout


class AccordionState:
    """How much of a gradient is sent: with Accordion more or less of it, with other compressors always the same.

    Attributes:
        regime: Accordion's, of the last step.
    """

    def __init__(self, config: Compressor, layout: Layout):
        self._accordion, self._layout = config if isinstance(config, Accordion) else None, layout
        self.regime = self._next = Regime()

    @property
    def decisions(self) -> tuple[tuple[int, str], ...]:
        """TensorStats.decisions."""
        return self.regime.decisions

    def amount(self, step: int, rate: float | None) -> int:
        """Compressor.amount, in the step that comes after so many steps and has this learning rate."""
        if self._accordion is None:
            return self._layout.amount
        self._next = self.regime.decided(self._accordion, step, rate, _norm)
        return self._accordion.amount_now(*self._layout.matrix, self._next.is_low)

    def end(self, update: torch.Tensor, weight: float) -> None:
        """Takes the update, (n, m), of a finite step whose averaged gradient was `weight` times it."""
        if self._accordion is not None:
            # Not in place: the step may still be discarded.
            total = self._next.total
            self._next.total = update * weight if total is None else torch.add(total, update, alpha=weight)

    def commit(self) -> None:
        """Keeps what `end` was told: the step is taken."""
        self.regime = self._next

    def state_dict(self) -> dict[str, object]:
        """What is kept, on the CPU; the same on every worker."""
        if self._accordion is None:
            return {}
        return {"regime": self.regime.state_dict(lambda total: total.cpu().clone())}

    def load_state_dict(self, state: Mapping, like: torch.Tensor) -> None:
        """Takes what another one kept; its tensors get the dtype and the device of `like`."""
        if self._accordion is not None:
            self.regime = Regime.from_state_dict(state["regime"], lambda total: total.to(like, copy=True))


def _norm(total: torch.Tensor) -> float:
    return torch.linalg.vector_norm(total, dtype=torch.float64).item()
