"""One step of all buckets, and whether it is finite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from horovod_powersgd.torch.workers import Workers


class Verdict:
    """Whether a step's averages are finite, on all workers alike; known when every bucket has said so.

    Attributes:
        called_for: whether the step is to end: until then, the gradients are left alone.
    """

    def __init__(self, buckets: int):
        self._awaited, self.called_for = buckets, False
        self._finite: list[torch.Tensor] = []
        self._result: bool | None = None

    def add(self, finite: Sequence[torch.Tensor]) -> "Verdict":
        """Takes one bucket's word: booleans, left on their device until all are there."""
        self._finite += finite
        self._awaited -= 1
        return self

    def done(self) -> bool:
        """Whether all buckets have their averages, and the step is to end."""
        return self.called_for and not self._awaited

    def result(self) -> bool:
        """Whether all of them are finite. The host waits for the device here, and where Accordion compares norms."""
        if self._result is None:
            by_device: dict[torch.device, list[torch.Tensor]] = {}
            for finite in self._finite:
                by_device.setdefault(finite.device, []).append(finite)
            self._result = all([torch.stack(some).all().item() for some in by_device.values()])
        return self._result


@dataclass
class Step:
    """One step of all buckets.

    Attributes:
        number: how many steps were exchanged before.
        parity: changes with every attempt at a step.
        scale: that the loss is multiplied by.
        factor: that the averages are multiplied by in the end.
        rates: learning rates, where they are known.
        verdict: shared by all buckets.
        workers: that take part.
        undoable: whether the step may still be discarded when it has ended.
        sent: bytes handed to Horovod.
        received: bytes handed back.
    """

    number: int
    parity: bool
    scale: float
    factor: float
    rates: Mapping[torch.nn.Parameter, float]
    verdict: Verdict
    workers: Workers
    undoable: bool = False
    sent: int = 0
    received: int = 0

    def count(self, sent: int, received: int) -> None:
        """Counts a message's bytes."""
        if self.workers.count > 1:
            self.sent += sent
            self.received += received
