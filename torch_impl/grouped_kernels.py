"""The passes over the gradients of a bucket on a GPU, by one kernel each.

A GPU goes over a gradient of a few megabytes in ten microseconds, and a host takes as long to ask for anything: asked
for one by one, as kernels.py does, the passes take the time of the asking. Here a table says where the matrices are,
and a kernel's programs share out tiles of all of them. The kernels are written in Triton, which comes with PyTorch for
GPUs. As there, factors are kept transposed.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from horovod_powersgd.torch.half_memory import Keep
from horovod_powersgd.torch.kernels import HalfStep, Product
from horovod_powersgd.torch.orthogonalization import TINY

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Of the factors; with more rows, a tile's sums do not fit into registers.
LARGEST_RANK = 32
# A program's tile, rows and columns, of which it takes one after the other: to make P it goes along its rows, to make
# Q down its columns, at most so far. What several programs find of the same number is added up by another kernel.
ROWS, COLUMNS = 8, 128
COLUMNS_OF_A_PROGRAM, ROWS_OF_A_PROGRAM = 16384, 256
# Numbers that a program of the adding kernel takes.
SUMS = 1024
# Of the kernels that orthogonalize: numbers that a program takes at once, and the most programs that share a factor.
TILE, PROGRAMS_OF_A_FACTOR = 4096, 64


def serve(device: torch.device, dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> bool:
    """Whether these kernels can be had, for matrices of these dtypes and ranks."""
    return set(dtypes) == {torch.float32} and max(ranks) <= LARGEST_RANK and _work(device)


@functools.cache
def _work(device: torch.device) -> bool:
    if triton is None:
        return False
    one = torch.ones(1, 1, device=device)
    try:
        products([Product(one, one, torch.empty_like(one))])
    except Exception as error:  # of a C compiler, as likely as of Triton
        warnings.warn(
            f"PowerSGD's kernels for GPUs cannot be compiled here ({type(error).__name__}: {error}): PyTorch's own "
            "operations take their place, and a step takes some times longer. Triton needs a C compiler, and Python's "
            "headers",
            stacklevel=2,
        )
        return False
    return True


def half_steps(tasks: Sequence[HalfStep], dtype: torch.dtype) -> torch.Tensor:
    """kernels.half_steps of float32 matrices, in a dtype."""
    device = tasks[0].delta.device
    plan = _plan(tuple((*task.delta.shape, len(task.basis), task.makes_q) for task in tasks), device)
    rows = []
    for delta, basis, _, memory, scale in tasks:
        left, p, q = (None, None, None) if memory is None else memory.parts()
        if memory is not None and left is not None and left.dtype == torch.float16:
            memory.add_to(delta, scale)
            left = None
        rows.append(
            (
                delta.data_ptr(), basis.data_ptr(), *delta.shape, len(basis), _address(left), _address(p), _address(q),
                0 if p is None else len(p), np.float64(scale).view(np.int64),
                left is not None and left.dtype == torch.bfloat16,
            )
        )  # fmt: skip
    table = _on(device, rows)
    adds = any(task.memory is not None for task in tasks)
    found = torch.empty(plan.found, dtype=torch.float32, device=device)
    for makes_q, tiles in plan.tiles:
        _half_step[(len(tiles),)](
            table, tiles, found, makes_q, adds, plan.rank, ROWS, COLUMNS,
            ROWS_OF_A_PROGRAM if makes_q else COLUMNS_OF_A_PROGRAM, num_warps=8 if plan.rank > 16 else 4,
        )  # fmt: skip
    if plan.sums is None:
        return found.to(dtype)
    factors = torch.empty(plan.numbers, dtype=dtype, device=device)
    _add_up[(len(plan.sums),)](plan.sums, found, factors, SUMS)
    return factors


def products(tasks: Sequence[Product]) -> None:
    """kernels.products of float32 matrices."""
    device = tasks[0].out.device
    plan = _plan(tuple((*task.out.shape, len(task.p), False) for task in tasks), device)
    table = [(out.data_ptr(), p.data_ptr(), q.data_ptr(), *out.shape, len(p)) for p, q, out in tasks]
    [(_, tiles)] = plan.tiles
    _product[(len(tiles),)](_on(device, table), tiles, ROWS, COLUMNS, COLUMNS_OF_A_PROGRAM)


def keep_all(tasks: Sequence[Keep]) -> None:
    """half_memory.keep of several float32 memories, to bfloat16."""
    device = tasks[0].halves.device
    rows, layout = [], []
    for memory, drawn, halves in tasks:
        delta, p, q = memory.parts()
        rank = 0 if p is None else len(p)
        rows.append(
            (
                halves.data_ptr(), delta.data_ptr(), _address(p), _address(q), *delta.shape, rank,
                drawn.rows.data_ptr(), drawn.columns.data_ptr(), drawn.of_step,
            )
        )  # fmt: skip
        layout.append((*delta.shape, 1, False))
    [(_, tiles)] = _plan(tuple(layout), device).tiles
    _keep[(len(tiles),)](_on(device, rows), tiles, ROWS, COLUMNS, COLUMNS_OF_A_PROGRAM)


def orthogonalize(factors: Sequence[torch.Tensor], spares: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """orthogonalization.orthogonalize of float32 factors (r, n), on a GPU; the spares are there."""
    device = factors[0].device
    plan = _columns_plan(tuple(tuple(factor.shape) for factor in factors), device)
    bases = torch.empty(plan.numbers, dtype=torch.float32, device=device).split(plan.sizes)
    # Each factor's numbers twice, and then all programs' sums and all inverses.
    work = torch.empty(2 * plan.numbers + plan.found, dtype=torch.float64, device=device)
    address, table = work.data_ptr(), []
    for factor, spare, basis, size in zip(factors, spares, bases, plan.sizes):
        nbytes = 8 * size
        table.append(
            (factor.data_ptr(), spare.data_ptr(), basis.data_ptr(), address, address + nbytes, *factor.shape)
        )
        address += 2 * nbytes
    found, on = work[2 * plan.numbers :], _on(device, table)
    programs, sizes = (len(plan.tiles),), (plan.rank, plan.length)
    _squares[programs](on, plan.tiles, found, *sizes)
    _regularize[programs](on, plan.tiles, plan.parts, found, *sizes, TINY)
    _inverse[(len(factors),)](on, plan.parts, found, plan.rank)
    _multiply[programs](on, plan.tiles, plan.parts, found, *sizes, False)
    _inverse[(len(factors),)](on, plan.parts, found, plan.rank)
    _multiply[programs](on, plan.tiles, plan.parts, found, *sizes, True)
    return [basis.view_as(factor) for basis, factor in zip(bases, factors)]


@dataclass(frozen=True)
class _ColumnsPlan:
    """How orthogonalize shares out its work, for factors of these shapes.

    Attributes:
        rank: of the largest, as the kernels see it.
        length: so many columns a program takes at once.
        sizes: how many numbers each factor has.
        tiles: a table with a row for each program: the factor, its first column and the one after its last, where its
            sums are.
        parts: a table with a row for each factor: where its first program's sums are, how many programs it has, where
            its inverse is.
        found: how many numbers all sums and inverses are.
    """

    rank: int
    length: int
    sizes: list[int]
    tiles: torch.Tensor
    parts: torch.Tensor
    found: int

    @property
    def numbers(self) -> int:
        return sum(self.sizes)


@functools.lru_cache(maxsize=256)
def _columns_plan(shapes: tuple[tuple[int, int], ...], device: torch.device) -> _ColumnsPlan:
    rank = _padded(max(rank for rank, _ in shapes))
    length, size = TILE // rank, rank * (rank + 2)  # of two rows of squares and a Gram matrix
    tiles, parts, found = [], [], 0
    for i, (_, n) in enumerate(shapes):
        blocks = -(-n // length)
        step = length * -(-blocks // PROGRAMS_OF_A_FACTOR)
        starts = range(0, n, step)
        tiles += [(i, start, min(start + step, n), found + k * size) for k, start in enumerate(starts)]
        parts.append((found, len(starts), found + len(starts) * size))
        found += len(starts) * size + rank * rank
    return _ColumnsPlan(rank, length, [r * n for r, n in shapes], _on(device, tiles), _on(device, parts), found)


@dataclass(frozen=True)
class _Plan:
    """How half_steps shares out its work, for matrices of these shapes and ranks.

    Attributes:
        rank: of the largest, as the kernels see it.
        tiles: for those that make P, and for those that make Q: (whether it is Q, a table with a row for each program).
        found: how many numbers the programs write.
        sums: a table with a row for each program of the adding kernel; None where there is nothing to add.
        numbers: that the factors have.
    """

    rank: int
    tiles: list[tuple[bool, torch.Tensor]]
    found: int
    sums: torch.Tensor | None
    numbers: int


@functools.lru_cache(maxsize=256)
def _plan(layout: tuple[tuple[int, int, int, bool], ...], device: torch.device) -> _Plan:
    tiles: dict[bool, list[tuple]] = {False: [], True: []}
    sums, found, numbers = [], 0, 0
    for i, (n, m, rank, makes_q) in enumerate(layout):
        size = rank * (m if makes_q else n)
        along, length = (n, ROWS_OF_A_PROGRAM) if makes_q else (m, COLUMNS_OF_A_PROGRAM)
        starts = range(0, along, length)
        for part, start in enumerate(starts):
            place = found + part * size
            across = range(0, m, COLUMNS) if makes_q else range(0, n, ROWS)
            tiles[makes_q] += [(i, *((start, at) if makes_q else (at, start)), place) for at in across]
        sums += [(found, len(starts), size, numbers, at) for at in range(0, size, SUMS)]
        found, numbers = found + len(starts) * size, numbers + size
    return _Plan(
        _padded(max(rank for _, _, rank, _ in layout)),
        [(makes_q, _on(device, some)) for makes_q, some in tiles.items() if some],
        found,
        None if found == numbers else _on(device, sums),
        numbers,
    )


def _padded(rank: int) -> int:
    """A power of two."""
    return 1 << (rank - 1).bit_length()


def _on(device: torch.device, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """A table on the device, which the host does not wait for."""
    # So little is on its way when this returns, though it comes from memory that is not pinned.
    return torch.from_numpy(np.array(rows, np.int64)).to(device, non_blocking=True)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


if triton is not None:

    @triton.jit
    def _pointer(table, row, column: tl.constexpr, columns: tl.constexpr, dtype: tl.constexpr):
        return tl.load(table + row * columns + column).to(tl.pointer_type(dtype))

    @triton.jit
    def _half_step(
        table, tiles, found, MAKES_Q: tl.constexpr, ADDS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, LENGTH: tl.constexpr,
    ):  # fmt: skip
        tile = tiles + 4 * tl.program_id(0)
        i = tl.load(tile)
        row, column, place = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        delta, basis = _pointer(table, i, 0, 11, tl.float32), _pointer(table, i, 1, 11, tl.float32)
        n, m, rank = tl.load(table + 11 * i + 2), tl.load(table + 11 * i + 3), tl.load(table + 11 * i + 4)
        left, p, q = (
            _pointer(table, i, 5, 11, tl.float32), _pointer(table, i, 6, 11, tl.float32),
            _pointer(table, i, 7, 11, tl.float32),
        )  # fmt: skip
        halves = _pointer(table, i, 5, 11, tl.int16)
        is_left, is_half = tl.load(table + 11 * i + 5) != 0, tl.load(table + 11 * i + 10) != 0
        rank_left = tl.load(table + 11 * i + 8)
        scale = tl.load((table + 11 * i + 9).to(tl.pointer_type(tl.float64))).to(tl.float32)
        ranks = tl.arange(0, RANK)
        sums = tl.zeros((RANK, ROWS, COLUMNS), tl.float32)
        along = row if MAKES_Q else column
        end = min(along + LENGTH, n if MAKES_Q else m)
        step: tl.constexpr = ROWS if MAKES_Q else COLUMNS
        for at in range(along, end, step):
            rows = (at if MAKES_Q else row) + tl.arange(0, ROWS)
            columns = (column if MAKES_Q else at) + tl.arange(0, COLUMNS)
            inside = (rows < n)[:, None] & (columns < m)[None, :]
            places = rows[:, None] * m + columns[None, :]
            numbers = tl.load(delta + places, inside, 0.0)
            if ADDS:
                if is_left:
                    if is_half:
                        bits = tl.load(halves + places, inside, 0).to(tl.int32) << 16
                        memory = bits.to(tl.float32, bitcast=True)
                    else:
                        memory = tl.load(left + places, inside, 0.0)
                    for k in range(rank_left):
                        of_p = tl.load(p + k * n + rows, rows < n, 0.0)
                        of_q = tl.load(q + k * m + columns, columns < m, 0.0)
                        memory -= of_p[:, None] * of_q[None, :]
                    numbers += scale * memory
                    tl.store(delta + places, numbers, inside)
            if MAKES_Q:
                some = tl.load(basis + ranks[:, None] * n + rows[None, :], (ranks < rank)[:, None] & (rows < n), 0.0)
                sums += numbers[None, :, :] * some[:, :, None]
            else:
                some = tl.load(
                    basis + ranks[:, None] * m + columns[None, :], (ranks < rank)[:, None] & (columns < m), 0.0
                )
                sums += numbers[None, :, :] * some[:, None, :]
        if MAKES_Q:
            columns = column + tl.arange(0, COLUMNS)
            to = found + place + ranks[:, None] * m + columns[None, :]
            tl.store(to, tl.sum(sums, axis=1), (ranks < rank)[:, None] & (columns < m)[None, :])
        else:
            rows = row + tl.arange(0, ROWS)
            to = found + place + ranks[:, None] * n + rows[None, :]
            tl.store(to, tl.sum(sums, axis=2), (ranks < rank)[:, None] & (rows < n)[None, :])

    @triton.jit
    def _add_up(sums, found, out, SUMS: tl.constexpr):
        of = sums + 5 * tl.program_id(0)
        place, parts, size = tl.load(of), tl.load(of + 1), tl.load(of + 2)
        numbers = tl.load(of + 4) + tl.arange(0, SUMS)
        total = tl.zeros((SUMS,), tl.float32)
        for part in range(parts):
            total += tl.load(found + place + part * size + numbers, numbers < size, 0.0)
        tl.store(out + tl.load(of + 3) + numbers, total.to(out.dtype.element_ty), numbers < size)

    @triton.jit
    def _product(table, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTH: tl.constexpr):
        tile = tiles + 4 * tl.program_id(0)
        i = tl.load(tile)
        row, column = tl.load(tile + 1), tl.load(tile + 2)
        out, p, q = (
            _pointer(table, i, 0, 6, tl.float32), _pointer(table, i, 1, 6, tl.float32),
            _pointer(table, i, 2, 6, tl.float32),
        )  # fmt: skip
        n, m, rank = tl.load(table + 6 * i + 3), tl.load(table + 6 * i + 4), tl.load(table + 6 * i + 5)
        rows = row + tl.arange(0, ROWS)
        for at in range(column, min(column + LENGTH, m), COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            numbers = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(rank):
                of_p = tl.load(p + k * n + rows, rows < n, 0.0)
                of_q = tl.load(q + k * m + columns, columns < m, 0.0)
                numbers += of_p[:, None] * of_q[None, :]
            inside = (rows < n)[:, None] & (columns < m)[None, :]
            tl.store(out + rows[:, None] * m + columns[None, :], numbers, inside)

    @triton.jit
    def _keep(table, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTH: tl.constexpr):
        tile = tiles + 4 * tl.program_id(0)
        i = tl.load(tile)
        row, column = tl.load(tile + 1), tl.load(tile + 2)
        halves, delta = _pointer(table, i, 0, 10, tl.int16), _pointer(table, i, 1, 10, tl.float32)
        p, q = _pointer(table, i, 2, 10, tl.float32), _pointer(table, i, 3, 10, tl.float32)
        n, m, rank = tl.load(table + 10 * i + 4), tl.load(table + 10 * i + 5), tl.load(table + 10 * i + 6)
        of_rows, of_columns = _pointer(table, i, 7, 10, tl.int32), _pointer(table, i, 8, 10, tl.int32)
        rows = row + tl.arange(0, ROWS)
        of_these = tl.load(of_rows + rows, rows < n, 0) + tl.load(table + 10 * i + 9).to(tl.int32)
        for at in range(column, min(column + LENGTH, m), COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            inside = (rows < n)[:, None] & (columns < m)[None, :]
            places = rows[:, None] * m + columns[None, :]
            numbers = tl.load(delta + places, inside, 0.0)
            for k in range(rank):
                of_p = tl.load(p + k * n + rows, rows < n, 0.0)
                of_q = tl.load(q + k * m + columns, columns < m, 0.0)
                numbers -= of_p[:, None] * of_q[None, :]
            drawn = (of_these[:, None] + tl.load(of_columns + columns, columns < m, 0)[None, :]) & 0xFFFF
            bits = numbers.to(tl.int32, bitcast=True) + drawn
            tl.store(halves + places, (bits >> 16).to(tl.int16), inside)

    @triton.jit
    def _squares(table, tiles, found, RANK: tl.constexpr, LENGTH: tl.constexpr):
        """Sums, over some columns, of the squares of a factor's rows and of the spare ones."""
        tile = tiles + 4 * tl.program_id(0)
        i, last = tl.load(tile), tl.load(tile + 2)
        factor, spare = _pointer(table, i, 0, 7, tl.float32), _pointer(table, i, 1, 7, tl.float64)
        rank, n = tl.load(table + 7 * i + 5), tl.load(table + 7 * i + 6)
        ranks, length = tl.arange(0, RANK), tl.arange(0, LENGTH)
        squares, spare_squares = tl.zeros((RANK, LENGTH), tl.float64), tl.zeros((RANK, LENGTH), tl.float64)
        for at in range(tl.load(tile + 1), last, LENGTH):
            inside, places = (ranks < rank)[:, None] & (at + length < last)[None, :], at + length[None, :]
            numbers = tl.load(factor + ranks[:, None] * n + places, inside, 0.0).to(tl.float64)
            others = tl.load(spare + ranks[:, None] * n + places, inside, 0.0)
            squares += numbers * numbers
            spare_squares += others * others
        to = found + tl.load(tile + 3) + ranks
        tl.store(to, tl.sum(squares, axis=1))
        tl.store(to + RANK, tl.sum(spare_squares, axis=1))

    @triton.jit
    def _gram(rows, rank, n, first, last, RANK: tl.constexpr, LENGTH: tl.constexpr):
        """Of some columns of rows (rank, n)."""
        ranks, length = tl.arange(0, RANK), tl.arange(0, LENGTH)
        gram = tl.zeros((RANK, RANK), tl.float64)
        for at in range(first, last, LENGTH):
            inside, places = at + length < last, at + length
            some = (ranks < rank)[:, None] & inside[None, :]
            numbers = tl.load(rows + ranks[:, None] * n + places[None, :], some, 0.0)
            for j in range(rank):
                row = tl.load(rows + j * n + places, inside, 0.0)
                gram += tl.where(ranks[None, :] == j, tl.sum(numbers * row[None, :], axis=1)[:, None], 0.0)
        return gram

    @triton.jit
    def _put_gram(gram, to, RANK: tl.constexpr):
        ranks = tl.arange(0, RANK)
        tl.store(to + 2 * RANK + RANK * ranks[:, None] + ranks[None, :], gram)

    @triton.jit
    def _regularize(table, tiles, parts, found, RANK: tl.constexpr, LENGTH: tl.constexpr, TINY: tl.constexpr):
        """Writes some columns of a factor's rows, to which the spare ones are added, as long as a rounding; and what
        these columns have of the Gram matrix."""
        tile = tiles + 4 * tl.program_id(0)
        i, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        factor, spare = _pointer(table, i, 0, 7, tl.float32), _pointer(table, i, 1, 7, tl.float64)
        rows = _pointer(table, i, 3, 7, tl.float64)
        rank, n = tl.load(table + 7 * i + 5), tl.load(table + 7 * i + 6)
        ranks, length = tl.arange(0, RANK), tl.arange(0, LENGTH)
        squares, spare_squares = tl.zeros((RANK,), tl.float64), tl.zeros((RANK,), tl.float64)
        of = found + tl.load(parts + 3 * i) + ranks
        for part in range(tl.load(parts + 3 * i + 1)):
            squares += tl.load(of + part * RANK * (RANK + 2))
            spare_squares += tl.load(of + part * RANK * (RANK + 2) + RANK)
        rounding = 1.1920928955078125e-07 * tl.sqrt(tl.max(squares, axis=0)) + TINY
        weights = rounding / tl.sqrt(tl.where(ranks < rank, spare_squares, 1.0))
        for at in range(first, last, LENGTH):
            inside, places = (ranks < rank)[:, None] & (at + length < last)[None, :], at + length[None, :]
            numbers = tl.load(factor + ranks[:, None] * n + places, inside, 0.0).to(tl.float64)
            numbers += weights[:, None] * tl.load(spare + ranks[:, None] * n + places, inside, 0.0)
            tl.store(rows + ranks[:, None] * n + places, numbers, inside)
        # What one thread has written, another one reads.
        tl.debug_barrier()
        _put_gram(_gram(rows, rank, n, first, last, RANK, LENGTH), found + tl.load(tile + 3), RANK)

    @triton.jit
    def _inverse(table, parts, found, RANK: tl.constexpr):
        """Writes the inverse of the Cholesky factor of a whole Gram matrix."""
        i = tl.program_id(0)
        rank, ranks = tl.load(table + 7 * i + 5), tl.arange(0, RANK)
        down, across = ranks[:, None], ranks[None, :]
        # Rows that are not there are those of the identity.
        gram = tl.where((down == across) & (ranks >= rank)[:, None], 1.0, 0.0).to(tl.float64)
        of = found + tl.load(parts + 3 * i) + 2 * RANK + RANK * down + across
        for part in range(tl.load(parts + 3 * i + 1)):
            gram += tl.load(of + part * RANK * (RANK + 2))
        triangle = tl.zeros((RANK, RANK), tl.float64)
        for j in range(RANK):
            column = tl.sum(tl.where(across == j, gram, 0.0), axis=1)
            row = tl.sum(tl.where(down == j, gram, 0.0), axis=0)
            pivot = tl.sqrt(tl.sum(tl.where(ranks == j, row, 0.0), axis=0))
            column, row = column / pivot, row / pivot
            triangle = tl.where((across == j) & (down >= j), column[:, None], triangle)
            gram -= column[:, None] * row[None, :]
        inverse = tl.zeros((RANK, RANK), tl.float64)
        for j in range(RANK):
            row = tl.sum(tl.where(down == j, triangle, 0.0), axis=0)
            pivot = tl.sum(tl.where(ranks == j, row, 0.0), axis=0)
            known = tl.sum(tl.where(down < j, row[:, None] * inverse, 0.0), axis=0)
            inverse = tl.where(down == j, ((tl.where(ranks == j, 1.0, 0.0) - known) / pivot)[None, :], inverse)
        tl.store(found + tl.load(parts + 3 * i + 2) + RANK * down + across, inverse)

    @triton.jit
    def _multiply(table, tiles, parts, found, RANK: tl.constexpr, LENGTH: tl.constexpr, IS_LAST: tl.constexpr):
        """Writes some columns of the inverse times the rows; of the basis, or in double precision, and what these
        columns have of the Gram matrix."""
        tile = tiles + 4 * tl.program_id(0)
        i, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        rank, n = tl.load(table + 7 * i + 5), tl.load(table + 7 * i + 6)
        rows, once = _pointer(table, i, 3, 7, tl.float64), _pointer(table, i, 4, 7, tl.float64)
        inverse = found + tl.load(parts + 3 * i + 2)
        ranks, length = tl.arange(0, RANK), tl.arange(0, LENGTH)
        for at in range(first, last, LENGTH):
            inside, places = at + length < last, at + length
            product = tl.zeros((RANK, LENGTH), tl.float64)
            for j in range(rank):
                row = tl.load((once if IS_LAST else rows) + j * n + places, inside, 0.0)
                product += tl.load(inverse + RANK * ranks + j)[:, None] * row[None, :]
            some, to = (ranks < rank)[:, None] & inside[None, :], ranks[:, None] * n + places[None, :]
            if IS_LAST:
                tl.store(_pointer(table, i, 2, 7, tl.float32) + to, product.to(tl.float32), some)
            else:
                tl.store(once + to, product, some)
        if not IS_LAST:
            tl.debug_barrier()
            _put_gram(_gram(once, rank, n, first, last, RANK, LENGTH), found + tl.load(tile + 3), RANK)
