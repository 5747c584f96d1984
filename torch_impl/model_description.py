"""What workers tell each other of their models."""

from collections.abc import Iterable

import torch


def describe(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, str]:
    """What all workers must have in common of their models, in words."""
    return {f"parameter {name}": f"{tuple(p.shape)} {p.dtype}" for name, p in parameters}


def sparse_dim(parameter: torch.nn.Parameter) -> int:
    """Of its gradient; 0 where that is dense, or not there."""
    return parameter.grad.sparse_dim() if parameter.grad is not None and parameter.grad.is_sparse else 0
