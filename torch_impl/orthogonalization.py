"""An orthonormal basis of a factor's columns."""

from typing import Callable

import torch

from horovod_powersgd.reference import DEPENDENT


def orthogonalize(factor: torch.Tensor, spare: Callable[[], torch.Tensor]) -> torch.Tensor:
    """reference.orthogonalize, by Householder QR in double precision, which is exact whatever the factor's condition.

    Args:
        factor: (r, n), r <= n, float32 or float64: a factor, transposed. Non-finite input gives non-finite output.
        spare: gives (r, n) float64 random rows; on a CPU it is called only when a row depends on those before it.

    Returns:
        (r, n) with orthonormal rows, contiguous, of the factor's dtype and device.
    """
    columns = factor.t().double()
    columns = columns / columns.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    q, r = torch.linalg.qr(columns)
    smallest = DEPENDENT * torch.finfo(factor.dtype).eps * r.norm(dim=0).max()
    dependent = r.diagonal().abs() <= smallest
    # Looking at the outcome is free on a CPU; on a GPU it would stop the host, and a second QR is cheaper.
    if factor.is_cuda or dependent.any():
        q, r = torch.linalg.qr(torch.where(dependent, spare().t(), columns))
    return q.t().to(factor.dtype, memory_format=torch.contiguous_format)
