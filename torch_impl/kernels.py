"""The passes over a whole gradient: the rest of an exchange is small.

On a processor they are compiled ones (horovod_powersgd/kernels/kernels.cpp); elsewhere, and where those could not be
compiled when this package was installed, PyTorch's own operations do the same.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from horovod_powersgd.kernels import compiled as _kernels

# A thread's least share of a matrix: below, waking it takes longer than its work.
BYTES_PER_THREAD = 2**20


class Memory:
    """delta - P^T Q: what was left of a delta (n, m) when P (s, n) and Q (s, m), kept transposed, were sent.

    It is only worked out where it is used next, which spares a pass over the matrix.
    """

    def __init__(self, delta: torch.Tensor, p: torch.Tensor | None = None, q: torch.Tensor | None = None):
        self._delta, self._p, self._q = delta, p, q

    def tensor(self) -> torch.Tensor:
        """The memory itself (n, m)."""
        if self._p is not None and self._q is not None:
            if _compiled(self._delta):
                _run_product(self._delta, self._delta, self._p, self._q, -1.0)
            else:
                self._delta.addmm_(self._p.t(), self._q, alpha=-1)
            self._p = self._q = None
        return self._delta

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """delta, P and Q; without the last two where the memory has been worked out."""
        return self._delta, self._p, self._q

    def add_to(self, delta: torch.Tensor, scale: float) -> None:
        """Adds `scale` times the memory to a delta (n, m), in place."""
        delta.add_(self.tensor(), alpha=scale)

    def to(self, device: torch.device) -> "Memory":
        """The same on another device."""
        return Memory(self.tensor().to(device))

    def storage(self) -> torch.Tensor:
        """A tensor (n, m) to write over, when the memory is no longer needed."""
        return self._delta


class HalfStep(NamedTuple):
    """Adds `scale` times the memory to delta, in place, and multiplies it by a basis.

    Attributes:
        delta: (n, m), contiguous.
        basis: (r, m), or (r, n) where Q is made; contiguous.
        makes_q: whether the basis is P^ and the result Q.
        memory, scale: what is added. None adds nothing.
    """

    delta: torch.Tensor
    basis: torch.Tensor
    makes_q: bool
    memory: Memory | None = None
    scale: float = 1.0


class Product(NamedTuple):
    """P^T Q, written to out (n, m), contiguous; P (r, n) and Q (r, m) are kept transposed."""

    p: torch.Tensor
    q: torch.Tensor
    out: torch.Tensor


def half_step(task: HalfStep) -> torch.Tensor:
    """basis delta^T (r, n), or basis delta (r, m): a factor, transposed."""
    delta, basis, makes_q, memory, scale = task
    if not _compiled(delta):
        if memory is not None:
            memory.add_to(delta, scale)
        return basis @ (delta if makes_q else delta.t())
    previous, p, q = (None, None, None) if memory is None else memory.parts()
    halves: tuple[int, ...] = ()
    if memory is not None and previous is not None and p is None:
        if previous.dtype == torch.bfloat16:
            halves = (previous.data_ptr(),)
        else:
            memory.add_to(delta, scale)
        previous = None
    (n, m), rank = delta.shape, len(basis)
    out = delta.new_zeros(rank, m if makes_q else n)
    arguments = (
        delta.dtype == torch.float64, delta.data_ptr(), _address(previous), scale, _address(p), _address(q),
        0 if p is None else len(p), basis.data_ptr(), out.data_ptr(), makes_q, rank, n, m,
    )
    # Each thread writes a part of the result of its own.
    _in_parts(delta, by_columns=makes_q, run=lambda part: _kernels.half_step(*arguments, *part, *halves))
    return out


def product(task: Product) -> None:
    """Writes P^T Q."""
    p, q, out = task
    if _compiled(out):
        _run_product(out, None, p, q, 1.0)
    else:
        torch.mm(p.t(), q, out=out)


def keeps(memory: Memory) -> bool:
    """Whether `keep` can be had."""
    return _compiled(memory.parts()[0])


def keep(memory: Memory, rows: torch.Tensor, columns: torch.Tensor, halves: torch.Tensor) -> None:
    """horovod_powersgd.rounding of a memory; the upper 16 bits go to halves (n, m).

    Args:
        rows, columns: (n,) and (m,) int32: what is drawn.
    """
    delta, p, q = memory.parts()
    n, m = delta.shape
    arguments = (
        delta.dtype == torch.float64, halves.data_ptr(), delta.data_ptr(), _address(p), _address(q),
        rows.data_ptr(), columns.data_ptr(), 0 if p is None else len(p), n, m,
    )
    _in_parts(delta, by_columns=False, run=lambda part: _kernels.keep(*arguments, *part))


def _run_product(out, start, p, q, sign):
    (n, m), rank = out.shape, len(p)
    p, q = p.contiguous(), q.contiguous()
    arguments = (
        out.dtype == torch.float64, out.data_ptr(), _address(start), p.data_ptr(), q.data_ptr(), sign, rank, n, m
    )
    _in_parts(out, by_columns=False, run=lambda part: _kernels.product(*arguments, *part))


def _compiled(tensor: torch.Tensor) -> bool:
    return _kernels is not None and tensor.device.type == "cpu"


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _in_parts(matrix: torch.Tensor, by_columns: bool, run: Callable[[tuple[int, int, int, int]], None]) -> None:
    """Runs over (first row, end, first column, end) of the matrix, on as many threads as PyTorch would use."""
    n, m = matrix.shape
    threads = min(torch.get_num_threads(), matrix.nbytes // BYTES_PER_THREAD)
    if threads <= 1:
        run((0, n, 0, m))
        return
    length = m if by_columns else n
    # Cuts at multiples of 16: no two threads write to the same line of the cache.
    cuts = [min(length, -(-length * i // threads) + 15 & ~15) for i in range(threads)] + [length]
    spans = [(a, b) for a, b in zip(cuts, cuts[1:]) if a < b]
    parts = [(0, n, a, b) if by_columns else (a, b, 0, m) for a, b in spans]
    list(_pool(torch.get_num_threads()).map(run, parts))


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="powersgd")
