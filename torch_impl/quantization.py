"""Averages in 8 bits a number, of tensors: horovod_powersgd.quantization, fast.

On a processor, codes are made and read by compiled passes (horovod_powersgd/kernels/quantization.cpp); elsewhere, and
where those could not be compiled, by PyTorch's operations.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from horovod_powersgd import quantization
from horovod_powersgd.kernels import codes as _codes
from horovod_powersgd.quantization import LEVELS
from horovod_powersgd.torch.bucket import joined
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.senders import Senders


class Part(NamedTuple):
    """What of a gradient is averaged: delta and `scale` times the memory.

    Attributes:
        delta: flat, contiguous.
        memory: the same; None adds nothing.
    """

    delta: torch.Tensor
    memory: torch.Tensor | None
    scale: float


class Span(NamedTuple):
    """Segments in a row, from the first up to the last, which is not one of them, counted over all slices.

    Attributes:
        place: where the first one begins in its slice.
    """

    first: int
    last: int
    place: int


class Slices:
    """quantization.Slices, and the messages that they travel in: for each slice its units and then its codes.

    Args:
        rows: for each matrix, how many there are, and how long they are.
        count: of slices.
        dtype, device: of the numbers.
    """

    def __init__(self, rows: tuple[tuple[int, int], ...], count: int, dtype: torch.dtype, device: torch.device):
        plan = quantization.Slices(np.repeat([length for _, length in rows], [number for number, _ in rows]), count)
        self.numbers = sum(number * length for number, length in rows)
        self.count, self.size, self.dtype = plan.count, plan.size, dtype
        self.nbytes = plan.nbytes(dtype.itemsize)
        # On the host, for the compiled passes.
        self.segments = np.ascontiguousarray(plan.segments)
        self._width = self.segments.shape[1]
        self._starts = np.cumsum(self.segments) - self.segments.reshape(-1)
        self._device = device
        self._compiled = _codes is not None and device.type == "cpu"

    @functools.cached_property
    def _segment_of(self) -> torch.Tensor:
        """(slices, size): which of a slice's segments each number is in."""
        columns = np.repeat(np.tile(np.arange(self._width), self.count), self.segments.reshape(-1))
        return torch.from_numpy(columns.reshape(self.count, self.size)).to(self._device)

    def _span_of_slices(self, index: int | None) -> Span:
        """Of all slices, or of the one with this index."""
        first, count = (0, self.count) if index is None else (index, 1)
        return Span(first * self._width, (first + count) * self._width, 0)

    def _spans_of_parts(self, sizes: Sequence[int]) -> list[Span]:
        """Of parts of the numbers, each of which has whole rows; zeros after the last row are the last part's."""
        firsts = np.searchsorted(self._starts, np.cumsum(sizes) - sizes).tolist()
        return [
            Span(first, last, int(self._starts[first]) - first // self._width * self.size)
            for first, last in zip(firsts, [*firsts[1:], self.segments.size])
        ]

    def encoded(self, numbers: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """The messages (slices, bytes) of all slices, or of the one with this index.

        Args:
            numbers: theirs, flat; what is missing at the end is zeros.
        """
        count = self.count if index is None else 1
        if self._compiled:
            messages = torch.empty(count, self.nbytes, dtype=torch.uint8)
            self._encode(Part(numbers, None, 1), self._span_of_slices(index), messages, leaves=False)
            return messages
        numbers = torch.nn.functional.pad(numbers, (0, count * self.size - len(numbers))).view(count, self.size)
        segment_of = self._segment_of.narrow(0, index or 0, count)
        largest = numbers.new_zeros(count, self._width)
        largest.scatter_reduce_(1, segment_of, numbers.abs(), "amax")
        units = torch.where(torch.isfinite(largest), largest / LEVELS, torch.nan)
        each = units.gather(1, segment_of)
        counted = each >= torch.finfo(self.dtype).tiny
        codes = torch.where(counted, (numbers / each).round(), 0).to(torch.int8)
        return torch.cat([units.view(torch.uint8), codes.view(torch.uint8)], 1)

    def encoded_parts(self, parts: Sequence[Part]) -> tuple[torch.Tensor, list[Any]]:
        """The messages (slices, bytes) of all slices, and each part's norm, a number or a scalar. In the deltas stays
        what the messages do not say."""
        deltas = [part.delta for part in parts]
        sizes = [len(delta) for delta in deltas]
        if self._compiled:
            messages = torch.empty(self.count, self.nbytes, dtype=torch.uint8)
            spans = self._spans_of_parts(sizes)
            return messages, [
                self._encode(part, span, messages[span.first // self._width], leaves=True) ** 0.5
                for part, span in zip(parts, spans)
            ]
        for delta, memory, scale in parts:
            if memory is not None:
                delta.add_(memory, alpha=scale)
        norms = [torch.linalg.vector_norm(delta, dtype=torch.float64) for delta in deltas]
        messages = self.encoded(joined(deltas))
        torch._foreach_sub_(deltas, self.decoded(messages.unsqueeze(0)).split(sizes))
        return messages, norms

    def _encode(self, part: Part, span: Span, messages: torch.Tensor, leaves: bool) -> float:
        """Writes the messages from the first segment's slice on."""
        delta, memory, scale = part
        return _codes.encode(
            self.dtype == torch.float64, delta.data_ptr(), len(delta), 0 if memory is None else memory.data_ptr(),
            scale, leaves, self.segments.ctypes.data, self._width, *span, self.nbytes, messages.data_ptr(),
        )

    def decoded(self, messages: torch.Tensor, divisor: int = 1, index: int | None = None) -> torch.Tensor:
        """The sum of what all senders' messages (senders, slices, bytes) say, over a divisor, flat: of all numbers, or
        of the slice with this index."""
        if self._compiled:
            out = torch.empty(self.numbers if index is None else self.size, dtype=self.dtype)
            self._decode(messages, divisor, self._span_of_slices(index), out)
            return out
        units, codes = self._units(messages) / divisor, messages.narrow(2, self.nbytes - self.size, self.size)
        segment_of = self._segment_of if index is None else self._segment_of.narrow(0, index, 1)
        total = torch.zeros(segment_of.shape, dtype=self.dtype, device=self._device)
        for unit, code in zip(units, codes.view(torch.int8)):
            total += code.to(self.dtype) * unit.gather(1, segment_of)
        return total.view(-1) if index is not None else total.view(-1).narrow(0, 0, self.numbers)

    def writers(
        self, messages: torch.Tensor, divisor: int, sizes: Sequence[int]
    ) -> list[Callable[[torch.Tensor], object]]:
        """For each part of so many numbers, what writes it of what `decoded` would give to a flat tensor."""
        if self._compiled:
            spans = self._spans_of_parts(sizes)
            return [
                functools.partial(self._decode, messages[:, span.first // self._width :], divisor, span)
                for span in spans
            ]
        parts = self.decoded(messages, divisor).split(list(sizes))
        return [functools.partial(_copy, part) for part in parts]

    def finite(self, messages: torch.Tensor, divisor: int) -> torch.Tensor:
        """Whether what `decoded` would give is finite, up to rounding; a boolean on the device."""
        return all_finite((self._units(messages) / divisor).sum(0) * (LEVELS + 1))

    def _units(self, messages: torch.Tensor) -> torch.Tensor:
        """(senders, slices, segments of a slice)."""
        units = messages.narrow(2, 0, self._width * self.dtype.itemsize)
        return units.clone(memory_format=torch.contiguous_format).view(self.dtype)

    def _decode(self, messages: torch.Tensor, divisor: int, span: Span, out: torch.Tensor) -> None:
        """Writes what the messages (senders, slices, bytes) say, which begin with the first segment's slice."""
        _codes.decode(
            self.dtype == torch.float64, messages.data_ptr(), len(messages), messages.stride(0),
            self.segments.ctypes.data, self._width, *span, messages.stride(1), divisor, out.data_ptr(), len(out),
        )


class CodedMean(NamedTuple):
    """All senders' mean, as it has come.

    Attributes:
        messages: (senders, slices, bytes): what they say sums to the mean,
        divisor: over this.
        first, more: what this sender is to add to its part of the mean, flat, and from which number on.
    """

    messages: torch.Tensor
    divisor: int
    first: int
    more: torch.Tensor


def _copy(part: torch.Tensor, out: torch.Tensor) -> None:
    # Not copy_, which PyTorch's fake tensors refuse where there is no such device.
    torch._foreach_copy_([out], [part])


# A model's buckets, each with its factors; with Accordion, of both ranks.
_slices = functools.lru_cache(1024)(Slices)


def slices_of(rows: Sequence[tuple[int, int]], senders: int, like: torch.Tensor) -> Slices:
    """Those of rows, as Slices takes them, that so many average; the numbers are of the kind of `like`."""
    return _slices(tuple(rows), quantization.slice_count(senders), like.dtype, like.device)


def coded_mean(
    slices: Slices, message: torch.Tensor, name: str, senders: Senders
) -> Generator[Any, Any, CodedMean]:
    """quantization.mean of what all senders' messages say. Yields what it waits for.

    Args:
        message: this sender's, of all slices.
        name: of the messages.
        senders: that average.
    """
    nothing = torch.empty(0, dtype=slices.dtype, device=message.device)
    if senders.count == 1:
        return CodedMean(message.unsqueeze(0), 1, 0, nothing)
    if slices.count == 1:
        messages = yield from senders.gather(message[0], name)
        return CodedMean(messages.unsqueeze(1), senders.count, 0, nothing)
    messages = yield from senders.exchange(message, name)
    index = senders.index
    mine = slices.decoded(messages.unsqueeze(1), senders.count, index)
    message = slices.encoded(mine, index)
    rounded = slices.decoded(message.unsqueeze(0), index=index)
    messages = yield from senders.gather(message[0], name)
    return CodedMean(messages.unsqueeze(0), 1, index * slices.size, (rounded - mine) * senders.count)


def quantized_mean(
    flat: torch.Tensor, rows: Sequence[tuple[int, int]], name: str, senders: Senders
) -> Generator[Any, Any, tuple[torch.Tensor, torch.Tensor]]:
    """quantization.mean of this sender's rows and the others'. Yields what it waits for.

    Args:
        flat: the rows, one after the other.
        rows: for each matrix, how many there are, and how long they are.
        (the others): as coded_mean's.

    Returns:
        The mean and this sender's part of it, both flat.
    """
    slices = slices_of(rows, senders.count, flat)
    message = slices.encoded(flat)
    own = slices.decoded(message.unsqueeze(0))
    mean = yield from coded_mean(slices, message, name, senders)
    add_from([own], mean.first, mean.more, 1)
    return slices.decoded(mean.messages, mean.divisor), own


def add_from(parts: Sequence[torch.Tensor], first: int, numbers: torch.Tensor, sign: int) -> None:
    """Adds numbers, from the first one's place on, to flat tensors that stand for one; what is too many is dropped."""
    for part in parts:
        start, end = max(first, 0), min(first + len(numbers), len(part))
        if start < end:
            part.narrow(0, start, end - start).add_(numbers.narrow(0, start - first, end - start), alpha=sign)
        first -= len(part)
