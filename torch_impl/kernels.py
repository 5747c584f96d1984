"""The passes over a whole gradient: the rest of an exchange is small.

On a processor they are compiled ones (horovod_powersgd/kernels/kernels.cpp); elsewhere, and where those could not be
compiled when this package was installed, PyTorch's own operations do the same.
"""

import functools
from collections.abc import Callable, Sequence
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
                shares = _Shares()
                _add_product(shares, self._delta, self._delta, self._p, self._q, -1.0)
                shares.run(_kernels.products)
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

    @property
    def size(self) -> int:
        """How many numbers the result has."""
        return self.basis.shape[0] * self.delta.shape[1 if self.makes_q else 0]


class Product(NamedTuple):
    """P^T Q, written to out (n, m); P (r, n) and Q (r, m) are kept transposed. All are contiguous."""

    p: torch.Tensor
    q: torch.Tensor
    out: torch.Tensor


def half_steps(tasks: Sequence[HalfStep]) -> torch.Tensor:
    """basis delta^T (r, n), or basis delta (r, m), of matrices of a device: factors, transposed, flat, one after the
    other."""
    first = tasks[0].delta
    if len({task.delta.dtype for task in tasks}) > 1:
        return torch.cat([half_steps([task]) for task in tasks])
    if not _compiled(first):
        return torch.cat([_half_step(task).view(-1) for task in tasks])
    factors = first.new_zeros(sum(task.size for task in tasks))
    shares, is_double, address = _Shares(), factors.dtype == torch.float64, factors.data_ptr()
    for task in tasks:
        delta, basis, makes_q, memory, scale = task
        previous, p, q = (None, None, None) if memory is None else memory.parts()
        halves = None
        if memory is not None and previous is not None and p is None:
            if previous.dtype == torch.bfloat16:
                halves = previous
            else:
                memory.add_to(delta, scale)
            previous = None
        # Each thread writes a part of the result of its own.
        shares.add(
            delta, makes_q, is_double, delta.data_ptr(), _address(previous), scale, _address(p), _address(q),
            0 if p is None else p.shape[0], basis.data_ptr(), address, makes_q, basis.shape[0], *delta.shape,
            _address(halves),
        )  # fmt: skip
        address += task.size * factors.element_size()
    shares.run(_kernels.half_steps)
    return factors


def _half_step(task: HalfStep) -> torch.Tensor:
    """By PyTorch's operations."""
    delta, basis, makes_q, memory, scale = task
    if memory is not None:
        memory.add_to(delta, scale)
    return basis @ (delta if makes_q else delta.t())


def products(tasks: Sequence[Product]) -> None:
    """Writes P^T Q of each; of matrices of a device."""
    if not _compiled(tasks[0].out):
        for p, q, out in tasks:
            torch.mm(p.t(), q, out=out)
        return
    shares = _Shares()
    for p, q, out in tasks:
        _add_product(shares, out, None, p, q, 1.0)
    shares.run(_kernels.products)


def keeps(memory: Memory) -> bool:
    """Whether `keep` can be had."""
    return _compiled(memory.parts()[0])


def keep(memory: Memory, rows: torch.Tensor, columns: torch.Tensor, halves: torch.Tensor) -> None:
    """horovod_powersgd.rounding of a memory; the upper 16 bits go to halves (n, m).

    Args:
        rows, columns: (n,) and (m,) int32: what is drawn.
    """
    (delta, p, q), shares = memory.parts(), _Shares()
    shares.add(
        delta, False, delta.dtype == torch.float64, halves.data_ptr(), delta.data_ptr(), _address(p), _address(q),
        rows.data_ptr(), columns.data_ptr(), 0 if p is None else p.shape[0], *delta.shape,
    )  # fmt: skip
    shares.run(_kernels.keep)


def _add_product(shares, out, start, p, q, sign):
    arguments = _address(out), _address(start), p.data_ptr(), q.data_ptr(), sign, p.shape[0], *out.shape
    shares.add(out, False, out.dtype == torch.float64, *arguments)


def _compiled(tensor: torch.Tensor) -> bool:
    return _kernels is not None and tensor.is_cpu


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Shares:
    """What each of as many threads as PyTorch would use is to do: a kernel's arguments, and which part of a matrix."""

    def __init__(self):
        self._threads = torch.get_num_threads()
        self._of_threads: list[list[tuple]] = [[] for _ in range(self._threads)]

    def add(self, matrix: torch.Tensor, by_columns: bool, *arguments: object) -> None:
        """Shares out the rows of a matrix, or its columns."""
        n, m = matrix.shape
        threads = min(self._threads, matrix.nbytes // BYTES_PER_THREAD)
        if threads <= 1:
            self._of_threads[0].append((*arguments, 0, n, 0, m))
            return
        length = m if by_columns else n
        # Cuts at multiples of 16: threads hardly ever write to the same line of the cache.
        cuts = [min(length, -(-length * i // threads) + 15 & ~15) for i in range(threads)] + [length]
        for share, a, b in zip(self._of_threads, cuts, cuts[1:]):
            if a < b:
                share.append((*arguments, 0, n, a, b) if by_columns else (*arguments, a, b, 0, m))

    def run(self, kernel: Callable[[list[tuple]], None]) -> None:
        shares = [share for share in self._of_threads if share]
        if len(shares) > 1:
            list(_pool(self._threads).map(kernel, shares))
        elif shares:
            kernel(shares[0])


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="powersgd")
