"""The parts of an exchange in PyTorch's profiler."""

import contextlib

import torch


def profiled(name: str) -> contextlib.AbstractContextManager:
    """Marks what runs inside as powersgd.NAME where a profiler is at work; costs next to nothing where none is."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"powersgd.{name}")
    return contextlib.nullcontext()
