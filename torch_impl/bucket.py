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


class Bucket:
    """Gradients that travel together as they are, in one flat tensor; of one device and one dtype on the wire.

    Attributes:
        gradients: in the order that they come in, more or less.
    """

    gradients: Sequence[PlainGradient]

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers, config: Compressor):
        self.gradients = list(gradients)
        self._name, self._workers, self._config = name, workers, config

    def exchange(self, step: Step) -> Generator[PlainGradient | Future | Verdict, Any, None]:
        """reference.exchange of these gradients. Yields what it waits for."""
        sparse: dict[PlainGradient, SparseMean] = {}
        finite = yield from self._rounds(step, sparse)
        for gradient, gathered in sparse.items():
            average = yield gathered
            step.count(0, gathered.nbytes)
            finite.append(all_finite(average.values()))
            gradient.receive_sparse(average)
        for gradient in self.gradients:
            if gradient.parameter.dtype == torch.float16:
                finite.append(gradient.fits(step.factor))
        is_finite = yield step.verdict.add(finite)
        copies: Copies = []
        self._end(is_finite, step, copies)
        copy_all(copies)

    def _end(self, finite: bool, step: Step, copies: Copies) -> None:
        """Ends all gradients' exchange; `copies` is for what is to be copied, all at once."""
        for gradient in self.gradients:
            gradient.end(finite, step.factor, step.undoable, copies)

    def _begin(self, gradients: Sequence[PlainGradient], step: Step, sparse: dict[PlainGradient, SparseMean]):
        """Waits for gradients, starts averaging sparse ones, which it notes, and returns the others."""
        for gradient in reversed(gradients):  # who waits for the last one is resumed least often
            if not gradient.done():
                yield gradient
        dense = []
        for gradient in gradients:
            gradient.begin(step.scale)
            if gradient.is_sparse:
                sparse[gradient], nbytes = gradient.send_sparse(self._workers, step.parity)
                step.count(nbytes, 0)
            else:
                dense.append(gradient)
        return dense

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        """Averages all gradients but the sparse ones; returns what _average does."""
        dense = yield from self._begin(self.gradients, step, sparse)
        return (yield from self._average(dense, [gradient.send() for gradient in dense], step, 0, in_place=True))

    def _average(
        self,
        senders: Sequence[PlainGradient],
        sent: Sequence[torch.Tensor],
        step: Step,
        number: int,
        in_place: bool,
        sizes: Sequence[int] = (),
    ):
        """Averages what they send in one message; returns whether the averages are finite: booleans on the device.

        Args:
            sizes: of each sender's part, where there are not as many tensors as senders.
        """
        if not sent:
            return []
        mean = self._start_mean(sent, step, number, in_place)
        return [self._received(senders, (yield mean), sizes or [part.numel() for part in sent])]

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
