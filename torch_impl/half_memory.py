"""A memory in 16 bits a number: horovod_powersgd.rounding, for PyTorch."""

import functools
from typing import NamedTuple

import torch

from horovod_powersgd import arrays, rounding
from horovod_powersgd.torch import arrays as tensors, kernels
from horovod_powersgd.torch.kernels import Memory

# PyTorch's operations work on so many numbers at a time, which stay in the cache.
NUMBERS = 2**17


class Drawn(NamedTuple):
    """What horovod_powersgd.rounding draws.

    Attributes:
        rows, columns: (n,) and (m,) int32: for those of a matrix, in all steps.
        of_step: for a step and a worker.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    of_step: int = 0

    @classmethod
    def of(cls, key: int, shape: tuple[int, int], device: torch.device) -> "Drawn":
        """Of a matrix."""
        rows, columns = rounding.of_rows_and_columns(arrays, key, *shape)
        return cls(torch.from_numpy(rows.copy()).to(device), torch.from_numpy(columns.copy()).to(device))

    def in_step(self, step: int, worker: int) -> "Drawn":
        """Of one step and one worker."""
        return self._replace(of_step=_of_step(step, worker))


@functools.lru_cache(maxsize=8)
def _of_step(step: int, worker: int) -> int:
    return int(rounding.of_step(arrays, step, worker))


class HalfMemory(Memory):
    """A memory of 16 bits a number.

    Args:
        halves: (n, m).
        dtype: of what is computed with it.
        unit: what the halves are multiplied by, a scalar; None where that is 1.
    """

    def __init__(self, halves: torch.Tensor, dtype: torch.dtype, unit: torch.Tensor | None = None):
        super().__init__(halves)
        self._dtype, self._unit = dtype, unit

    @classmethod
    def of(cls, memory: torch.Tensor, halves: torch.dtype) -> "HalfMemory":
        """A memory, rounded to nearest: once, that does no harm."""
        unit = _unit(memory) if halves == torch.float16 else None
        return cls((memory if unit is None else memory / unit).to(halves), memory.dtype, unit)

    def to(self, device: torch.device) -> "HalfMemory":
        unit = None if self._unit is None else self._unit.to(device)
        return HalfMemory(self._delta.to(device), self._dtype, unit)

    def tensor(self) -> torch.Tensor:
        return self._widened(self._delta)

    def add_to(self, delta: torch.Tensor, scale: float) -> None:
        # A part at a time, in single precision: of two dtypes PyTorch adds slowly.
        for whole, halves in zip(_parts(delta), _parts(self._delta)):
            whole.add_(self._widened(halves), alpha=scale)

    def _widened(self, halves: torch.Tensor) -> torch.Tensor:
        found = halves.to(self._dtype)
        return found if self._unit is None else found.mul_(self._unit)


class Keep(NamedTuple):
    """Writes a memory, which is used up, to halves (n, m), rounded stochastically."""

    memory: Memory
    drawn: Drawn
    halves: torch.Tensor


def keep(task: Keep) -> HalfMemory:
    """What is kept of a memory."""
    memory, drawn, halves = task
    if halves.dtype == torch.bfloat16 and kernels.keeps(memory):
        kernels.keep(memory, drawn.rows + drawn.of_step, drawn.columns, halves)
        return HalfMemory(halves, memory.storage().dtype)
    left = memory.tensor()
    unit = _unit(left) if halves.dtype == torch.float16 else None
    cut_off = (1 << rounding.BITS_CUT_OFF[str(halves.dtype).removeprefix("torch.")]) - 1
    of_rows = (drawn.rows + drawn.of_step).unsqueeze(1)
    for rows, part, to in zip(_parts(of_rows, len(drawn.columns)), _parts(left), _parts(halves)):
        bits = (rows + drawn.columns).bitwise_and_(cut_off)
        bits.add_(part.float().view(torch.int32)).bitwise_and_(~cut_off)
        rounded = bits.view(torch.float32)
        # Not copy_, of which PyTorch's fake tensors know nothing on a GPU.
        torch._foreach_copy_([to], [rounded if unit is None else rounded.div_(unit)])
    return HalfMemory(halves, left.dtype, unit)


def _unit(memory: torch.Tensor) -> torch.Tensor:
    """rounding.unit_of_halves; makes no copy of the memory."""
    return rounding.unit_of_halves(tensors, torch.linalg.vector_norm(memory, torch.inf).float())


def _parts(matrix: torch.Tensor, columns: int | None = None) -> tuple[torch.Tensor, ...]:
    """Some rows after the other."""
    return matrix.split(max(1, NUMBERS // max(1, matrix.shape[1] if columns is None else columns)))
