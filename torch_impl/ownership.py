"""Whether a gradient's memory is its own.

Autograd hands out views of one storage: both sides of a sum get the same one, and a parameter can get a part of what
earlier layers still need. Users put views of one flat buffer into p.grad. What is changed in place, or becomes the
error-feedback memory, must be nobody else's.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch

# torch.Tensor's, in releases that have it.
_use_count: Any = getattr(torch.Tensor, "_use_count", None)


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold a tensor in C++ and in Python, those included that ask."""
    return _use_count(tensor), sys.getrefcount(tensor)


def _holders_of_a_base() -> tuple[int, int]:
    """Of one that its view holds, and nobody else: how many ask depends on PyTorch's release."""
    view = torch.empty(2, 2).t()
    base = view._base
    assert base is not None
    return _holders(base)


_CAN_TELL = _use_count is not None and hasattr(torch._C, "_storage_Use_Count")
_BASE_ALONE = _holders_of_a_base() if _CAN_TELL else None
# The parameter, and PyTorch's object for Python.
_GRADIENT_ALONE = 2


def owns_storage(gradient: torch.Tensor, incoming: torch.Tensor | None = None) -> bool:
    """Whether a dense gradient is alone in its storage, and nobody but its parameter holds it.

    Where PyTorch cannot tell, it says no.

    Args:
        gradient: a parameter's.
        incoming: what backward has handed over, while the hook that was called with it runs: usually another tensor
            of the same storage.
    """
    if not _CAN_TELL or gradient.requires_grad or gradient._base is not None:
        return False
    storage = gradient.untyped_storage()
    if storage.nbytes() != gradient.nbytes or _use_count(gradient) != _GRADIENT_ALONE:
        return False
    holders = 2  # the gradient, and the object that asks
    if incoming is not None and _same_storage(incoming, storage):
        holders += 1
        base = incoming._base
        if base is not None:  # a transposed product, say: its views hold it, and nobody else may
            holders += 1
            if _holders(base) != _BASE_ALONE:
                return False
    return torch._C._storage_Use_Count(storage._cdata) == holders


def _same_storage(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage()._cdata == storage._cdata


def overlapping(gradients: Iterable[torch.Tensor]) -> list[bool]:
    """For each dense tensor, whether it has memory in common with another of them."""
    gradients = list(gradients)
    overlaps = [False] * len(gradients)
    if len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(gradients):
        return overlaps  # as nearly always
    spans = sorted((*_span(gradient), i) for i, gradient in enumerate(gradients))
    farthest = last = -1
    for start, end, i in spans:
        if start < farthest:
            overlaps[i] = overlaps[last] = True
        if end > farthest:
            farthest, last = end, i
    return overlaps


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the byte after its last one."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
