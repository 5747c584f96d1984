"""Orthonormal bases of factors' columns."""

from collections.abc import Callable, Sequence

import torch

from horovod_powersgd.factors import orthogonalize as orthogonalize_by_columns
from horovod_powersgd.kernels import compiled as _kernels
from horovod_powersgd.torch.profiling import profiled

# The part of a column of its own, next to the longest one, that a Cholesky factor in double precision can be trusted
# with: rounding grows with its square. It is above what the reference takes for dependent in single precision.
TRUSTED = 1e-5
# From this part on, one pass makes a basis that is orthonormal in single precision.
ONE_PASS = 1e-3
# Up to so many numbers times rank, a compiled pass is faster than PyTorch's operations, which take their calls.
SMALL = 2**15
# Added to a rounding, for a factor of zeros.
TINY = 1e-100


def orthogonalize(
    factors: Sequence[torch.Tensor], spares: Sequence[Callable[[], torch.Tensor]]
) -> list[torch.Tensor]:
    """factors.orthogonalize of several factors, by the Cholesky factors of their Gram matrices, in double precision.

    The bases are others than the reference's, of the same spaces, which is all that an update depends on. Where a row
    depends on those before it, the reference itself does the work, on the host. It is rare; but whether it is so cannot
    be known without waiting for the device. So elsewhere than on a processor, random rows as long as a rounding are
    added to factors in single precision, which makes all rows independent.

    Args:
        factors: each (r, n), r <= n, float32 or float64: a factor, transposed. Of a non-finite one the basis is
            non-finite.
        spares: for each factor, gives (r, n) float64 random rows, when they are needed.

    Returns:
        For each (r, n) with orthonormal rows, contiguous, of the factor's dtype and device.
    """
    bases = list(factors)  # to be replaced, one by one
    by_rank: dict[int, list[int]] = {}
    with profiled("orthogonalize"):
        for i, factor in enumerate(factors):
            basis = _of_small(factor)
            if basis is None:
                by_rank.setdefault(len(factor), []).append(i)
            else:
                bases[i] = basis
        for places in by_rank.values():
            some, their_spares = [factors[i] for i in places], [spares[i] for i in places]
            ask = some[0].device.type == "cpu" or any(factor.dtype == torch.float64 for factor in some)
            for i, basis in zip(places, (_checked if ask else _unchecked)(some, their_spares)):
                bases[i] = basis
    return bases


def _of_small(factor: torch.Tensor) -> torch.Tensor | None:
    """Of a small factor in single precision, on a processor; None where one pass is not enough."""
    rank, n = factor.shape
    if _kernels is None or factor.dtype != torch.float32 or rank * rank * n > SMALL or not factor.is_cpu:
        return None
    factor = factor.contiguous()
    basis = torch.empty_like(factor)
    part = _kernels.basis(factor.data_ptr(), basis.data_ptr(), rank, n)
    return basis if part >= ONE_PASS else None


def _checked(factors: Sequence[torch.Tensor], spares: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    rows = [factor.double() for factor in factors]
    inverses, parts = _triangles(rows)
    bases = []
    for factor, spare, row, inverse, part in zip(factors, spares, rows, inverses, parts.tolist()):
        if part > TRUSTED:
            basis = inverse @ row
            if part < ONE_PASS or factor.dtype == torch.float64:
                basis = _triangles([basis])[0][0] @ basis
            bases.append(basis.to(factor.dtype))
        elif torch.isfinite(factor).all():
            basis = orthogonalize_by_columns(factor.t().cpu().numpy(), spare().t().cpu().numpy())
            bases.append(torch.from_numpy(basis).t().contiguous().to(factor.device))
        else:
            bases.append(torch.full_like(factor, torch.nan))
    return bases


def _unchecked(factors: Sequence[torch.Tensor], spares: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    rows = []
    for factor, spare in zip(factors, spares):
        row, random = factor.double(), spare()
        rounding = torch.finfo(factor.dtype).eps * torch.linalg.vector_norm(row, dim=1).amax()
        rows.append(row + random * ((rounding + TINY) / torch.linalg.vector_norm(random, dim=1, keepdim=True)))
    for _ in range(2):
        rows = [inverse @ row for inverse, row in zip(_triangles(rows)[0], rows)]
    return [row.to(factor.dtype) for row, factor in zip(rows, factors)]


def _triangles(factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What makes the rows of each factor orthonormal, (r, r), and the least part of a row that is its own."""
    grams = torch.stack([factor @ factor.t() for factor in factors])
    triangles = torch.linalg.cholesky_ex(grams)[0]
    parts = triangles.diagonal(dim1=1, dim2=2).amin(1) / grams.diagonal(dim1=1, dim2=2).amax(1).sqrt()
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    return torch.linalg.solve_triangular(triangles, identity, upper=False), parts
