"""An orthonormal basis of a factor's columns."""

from typing import Callable

import torch

from horovod_powersgd.reference import DEPENDENT, orthogonalize as orthogonalize_by_columns


def orthogonalize(factor: torch.Tensor, spare: Callable[[], torch.Tensor]) -> torch.Tensor:
    """reference.orthogonalize, by Householder QR in double precision, which is exact whatever the factor's condition.

    Where a row depends on those before it, QR goes on with an arbitrary direction, and what follows is judged against
    that: then the reference does the work, on the host. It is rare.

    Args:
        factor: (r, n), r <= n, float32 or float64: a factor, transposed. Non-finite input gives non-finite output.
        spare: gives (r, n) float64 random rows, when they are needed.

    Returns:
        (r, n) with orthonormal rows, contiguous, of the factor's dtype and device.
    """
    columns = factor.t().double()
    columns = columns / columns.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    q, r = torch.linalg.qr(columns)
    smallest = DEPENDENT * torch.finfo(factor.dtype).eps * r.norm(dim=0).max()
    if (r.diagonal().abs() <= smallest).any():
        basis = orthogonalize_by_columns(factor.t().cpu().numpy(), spare().t().cpu().numpy())
        return torch.from_numpy(basis).t().contiguous().to(factor.device)
    return q.t().to(factor.dtype, memory_format=torch.contiguous_format)
