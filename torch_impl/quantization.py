"""Averages in 8 bits a number, of tensors: horovod_powersgd.quantization, fast.

On a processor, codes are made and read by compiled passes (horovod_powersgd/kernels/quantization.cpp); elsewhere, and
where those could not be compiled, by PyTorch's operations.
"""

import functools
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from horovod_powersgd import quantization
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.kernels import codes as _codes
from horovod_powersgd.quantization import LEVELS
from horovod_powersgd.torch.step import Step


class Slices:
    """quantization.Slices, and the messages that they travel in: for each slice its units and then its codes.

    Args:
        rows: for each matrix, how many there are, and how long they are.
        count: of slices.
        dtype, device: of the numbers.
    """

    def __init__(self, rows: tuple[tuple[int, int], ...], count: int, dtype: torch.dtype, device: torch.device):
        plan = quantization.Slices(np.repeat([length for _, length in rows], [number for number, _ in rows]), count)
        self.count, self.size, self.dtype = plan.count, plan.size, dtype
        self.nbytes = plan.nbytes(dtype.itemsize)
        # On the host, for the compiled passes.
        self.segments = np.ascontiguousarray(plan.segments)
        self._device = device

    @functools.cached_property
    def _segment_of(self) -> torch.Tensor:
        """(slices, size): which of a slice's segments each number is in."""
        count, width = self.segments.shape
        columns = np.repeat(np.tile(np.arange(width), count), self.segments.reshape(-1))
        return torch.from_numpy(columns.reshape(count, self.size)).to(self._device)

    def encoded(self, numbers: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """The messages (slices, bytes) of all slices, or of the one with this index.

        Args:
            numbers: theirs, flat; what is missing at the end is zeros.
        """
        first, count = (0, self.count) if index is None else (index, 1)
        if _codes is not None and self._device.type == "cpu":
            message = torch.empty(count, self.nbytes, dtype=torch.uint8)
            _codes.encode(
                self.dtype == torch.float64, numbers.data_ptr(), len(numbers), self.segments[first].ctypes.data,
                self.segments.shape[1], count, self.size, message.data_ptr(), self.nbytes,
            )
            return message
        numbers = torch.nn.functional.pad(numbers, (0, count * self.size - len(numbers))).view(count, self.size)
        segment_of = self._segment_of.narrow(0, first, count)
        largest = numbers.new_zeros(count, self.segments.shape[1])
        largest.scatter_reduce_(1, segment_of, numbers.abs(), "amax")
        units = torch.where(torch.isfinite(largest), largest / LEVELS, torch.nan)
        each = units.gather(1, segment_of)
        counted = each >= torch.finfo(self.dtype).tiny
        codes = torch.where(counted, (numbers / each).round(), 0).to(torch.int8)
        return torch.cat([units.view(torch.uint8), codes.view(torch.uint8)], 1)

    def decoded(
        self, messages: torch.Tensor, index: int | None = None, divisor: int = 1, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The numbers, flat, that the messages of all slices, or of the one with this index, hold.

        Args:
            messages: (slices, bytes).
            divisor: of the numbers.
            out: what to add them to.
        """
        first, count = (0, self.count) if index is None else (index, 1)
        if _codes is not None and self._device.type == "cpu":
            adds = out is not None
            out = torch.empty(count * self.size, dtype=self.dtype) if out is None else out
            _codes.decode(
                self.dtype == torch.float64, messages.data_ptr(), messages.stride(0), self.segments[first].ctypes.data,
                self.segments.shape[1], count, self.size, divisor, out.data_ptr(), adds,
            )
            return out
        units, codes = messages.split([self.segments.shape[1] * self.dtype.itemsize, self.size], 1)
        units = units.clone(memory_format=torch.contiguous_format).view(self.dtype)
        codes = codes.view(torch.int8)
        found = (codes.to(self.dtype) * (units / divisor).gather(1, self._segment_of.narrow(0, first, count))).view(-1)
        return found if out is None else out.add_(found)

    def summed(self, messages: torch.Tensor, index: int) -> torch.Tensor:
        """The mean of what all workers' messages (W, bytes) say of one slice, in the workers' order."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self._device)
        for worker in range(len(messages)):
            self.decoded(messages.narrow(0, worker, 1), index, len(messages), total)
        return total


# A model's buckets, each with its factors; with Accordion, of both ranks.
_slices = functools.lru_cache(1024)(Slices)


def quantized_mean(
    flat: torch.Tensor,
    rows: tuple[tuple[int, int], ...],
    name: str,
    step: Step,
    compressor: Compressor,
) -> Generator[Any, Any, tuple[torch.Tensor, torch.Tensor]]:
    """quantization.mean of this worker's rows and the others'. Yields what it waits for.

    Args:
        flat: the rows, one after the other.
        rows: for each matrix, how many there are, and how long they are.
        name: of the messages.
        step: that this belongs to.
        compressor: that asks for it.

    Returns:
        The mean and this worker's part of it, both flat.
    """
    workers = step.workers
    slices = _slices(rows, quantization.slice_count(workers.count), flat.dtype, flat.device)
    message = slices.encoded(flat)
    own = slices.decoded(message)
    if workers.count == 1:
        own = own.narrow(0, 0, len(flat))
        return own, own
    step.count(message.nbytes, message.nbytes if slices.count > 1 else message.nbytes * workers.count)
    if slices.count == 1:
        messages = yield workers.gather(message[0], f"{name}.gather", step.parity, compressor)
        mean = slices.summed(messages, 0)
    else:
        messages = yield workers.exchange(message, f"{name}.alltoall", step.parity, compressor)
        index, mine = workers.index, slices.summed(messages, workers.index)
        message = slices.encoded(mine, index)
        step.count(message.nbytes, message.nbytes * workers.count)
        messages = yield workers.gather(message[0], f"{name}.gather", step.parity, compressor)
        mean = slices.decoded(messages)
        rounded = mean.narrow(0, index * slices.size, slices.size)
        own.narrow(0, index * slices.size, slices.size).add_(rounded - mine, alpha=workers.count)
    return mean.narrow(0, 0, len(flat)), own.narrow(0, 0, len(flat))
