"""Gradients that are exchanged together: those that are averaged as they are."""

from collections.abc import Generator, Sequence
from typing import Any

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.futures import Future, Mean, SparseMean
from horovod_powersgd.torch.gradient import Copies, PlainGradient, copy_all
from horovod_powersgd.torch.step import Step, Verdict
from horovod_powersgd.torch.workers import Workers

# A bucket of so few bytes begins when its last gradient is there: to begin with one after the other takes more calls,
# and saves little.
SMALL_BYTES = 2**20


class Bucket:
    """Gradients that travel together as they are, in one flat tensor; of one device and one dtype on the wire.

    Attributes:
        gradients: in the order that they come in, more or less.
    """

    gradients: Sequence[PlainGradient]

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers, config: Compressor):
        self.gradients = list(gradients)
        self._name, self._workers, self._config = name, workers, config
        # To be waited for in this order: the last one first, where all are.
        is_small = sum(gradient.nbytes for gradient in gradients) <= SMALL_BYTES
        self._last_first = self.gradients[::-1] if is_small else []

    def exchange(self, step: Step) -> Generator[PlainGradient | Future | Verdict, Any, None]:
        """reference.exchange of these gradients. Yields what it waits for."""
        sparse: dict[PlainGradient, SparseMean] = {}
        finite = yield from self._rounds(step, sparse)
        for gradient, gathered in sparse.items():
            average = yield gathered
            step.count(0, gathered.nbytes)
            finite = all_finite(average.values()) & finite
            gradient.receive_sparse(average)
        for gradient in self.gradients:
            if gradient.parameter.dtype == torch.float16:
                finite = gradient.fits(step.factor) & finite
        finite = yield step.verdict.add(finite)
        copies: Copies = []
        self._end(finite, step, copies)
        copy_all(copies)

    def _end(self, finite: bool, step: Step, copies: Copies) -> None:
        """Ends all gradients' exchange; `copies` is for what is to be copied, all at once."""
        for gradient in self.gradients:
            gradient.end(finite, step.factor, step.undoable, copies)

    def _begin(self, gradient: PlainGradient, step: Step, sparse: dict[PlainGradient, SparseMean]):
        """Waits for a gradient; starts averaging it where it is sparse, and notes that."""
        while not gradient.done():
            yield next((other for other in self._last_first if not other.done()), gradient)
        gradient.begin(step.scale)
        if gradient.is_sparse:
            sparse[gradient], nbytes = gradient.send_sparse(self._workers, step.parity)
            step.count(nbytes, 0)

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        """Averages all gradients but the sparse ones; returns whether the averages are finite, on the device."""
        senders, sent = [], []
        for gradient in self.gradients:
            yield from self._begin(gradient, step, sparse)
            if gradient not in sparse:
                senders.append(gradient)
                sent.append(gradient.send())
        return (yield from self._average(senders, sent, step, 0, in_place=True))

    def _average(
        self,
        senders: Sequence[PlainGradient],
        sent: Sequence[torch.Tensor],
        step: Step,
        number: int,
        in_place: bool,
        sizes: Sequence[int] = (),
    ):
        """Averages what they send in one message; returns whether the averages are finite, on the device.

        Args:
            sizes: of each sender's part, where there are not as many tensors as senders.
        """
        if not sent:
            return True
        mean = self._start_mean(sent, step, number, in_place)
        return self._received(senders, (yield mean), sizes or [part.numel() for part in sent])

    def _start_mean(self, sent: Sequence[torch.Tensor], step: Step, number: int, in_place: bool) -> Mean:
        """Starts averaging these in one message."""
        flat = joined(sent)
        step.count(flat.nbytes, flat.nbytes)
        return self._workers.mean(flat, f"{self._name}.{number}", in_place)

    def _received(self, senders: Sequence[PlainGradient], flat: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Hands out an average; returns whether it is finite, on the device."""
        for gradient, part in zip(senders, flat.split(list(sizes))):
            gradient.receive(part)
        return self._is_finite(flat)

    def _is_finite(self, flat: torch.Tensor) -> torch.Tensor:
        """Whether an average is finite, on the device."""
        return all_finite(flat)


def joined(flat: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other; a single one is not copied."""
    return torch.cat(list(flat)) if len(flat) > 1 else flat[0]
