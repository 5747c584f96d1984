"""Orthonormal bases of factors' columns."""

from typing import Callable, Dict, List, Sequence

import torch

from horovod_powersgd.reference import orthogonalize as orthogonalize_by_columns

# The part of a column of its own, next to the longest one, that a Cholesky factor in double precision can be trusted
# with: rounding grows with its square. It is above what the reference takes for dependent in single precision.
TRUSTED = 1e-5
# From this part on, one pass makes a basis that is orthonormal in single precision.
ONE_PASS = 1e-3


def orthogonalize(
    factors: Sequence[torch.Tensor], spares: Sequence[Callable[[], torch.Tensor]]
) -> List[torch.Tensor]:
    """reference.orthogonalize of several factors, by the Cholesky factors of their Gram matrices, in double precision.

    The bases are others than the reference's, of the same spaces, which is all that an update depends on. Where a row
    depends on those before it, the reference itself does the work, on the host. It is rare.

    Args:
        factors: each (r, n), r <= n, float32 or float64: a factor, transposed. Of a non-finite one the basis is
            non-finite.
        spares: for each factor, gives (r, n) float64 random rows, when they are needed.

    Returns:
        For each (r, n) with orthonormal rows, contiguous, of the factor's dtype and device.
    """
    bases: List[torch.Tensor] = [None] * len(factors)
    by_rank: Dict[int, List[int]] = {}
    for i, factor in enumerate(factors):
        by_rank.setdefault(len(factor), []).append(i)
    for places in by_rank.values():
        rows = [factors[i].double() for i in places]
        # The host waits here for the device: once for all factors of a bucket.
        inverses, parts = _triangles(rows)
        for i, row, inverse, part in zip(places, rows, inverses, parts.tolist()):
            factor = factors[i]
            if part > TRUSTED:
                basis = inverse @ row
                if part < ONE_PASS or factor.dtype == torch.float64:
                    basis = _triangles([basis])[0][0] @ basis
                bases[i] = basis.to(factor.dtype)
            elif torch.isfinite(factor).all():
                basis = orthogonalize_by_columns(factor.t().cpu().numpy(), spares[i]().t().cpu().numpy())
                bases[i] = torch.from_numpy(basis).t().contiguous().to(factor.device)
            else:
                bases[i] = torch.full_like(factor, torch.nan)
    return bases


def _triangles(factors: Sequence[torch.Tensor]):
    """What makes the rows of each factor orthonormal, (r, r), and the least part of a row that is its own."""
    grams = torch.stack([factor @ factor.t() for factor in factors])
    triangles = torch.linalg.cholesky_ex(grams)[0]
    parts = triangles.diagonal(dim1=1, dim2=2).amin(1) / grams.diagonal(dim1=1, dim2=2).amax(1).sqrt()
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    return torch.linalg.solve_triangular(triangles, identity, upper=False), parts
