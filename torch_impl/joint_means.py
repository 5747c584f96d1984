"""Gradients that are averaged as they are or in half precision, all in one message, when the last of them is there."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from horovod.torch.mpi_ops import allreduce_async_, synchronize

from horovod_powersgd.torch.gradient import PlainGradient, put_all
from horovod_powersgd.torch.profiling import profiled
from horovod_powersgd.torch.workers import Workers


class _Message(NamedTuple):
    """Gradients of one kind.

    Attributes:
        flat: what is averaged; kept from step to step, with
        parts: of it, a gradient's each, in its shape.
    """

    gradients: list[PlainGradient]
    flat: torch.Tensor
    parts: list[torch.Tensor]


class JointMeans:
    """The other way of a DirectExchange, with DirectMeans's methods: gradients leave together.

    Args:
        workers: that average.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        self._messages: list[_Message] = []
        # How many gradients are not there yet; and Horovod's handles, of each message that has left.
        self._missing = 0
        self._handles: list[int] = []

    def pack(self, gradients: Sequence[PlainGradient]) -> None:
        """From the next step on, these are averaged; what is still on its way is forgotten."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[PlainGradient]] = {}
        for gradient in gradients:
            by_kind.setdefault(gradient.kind, []).append(gradient)
        self._messages, self._handles = [_message(some, *kind) for kind, some in by_kind.items()], []

    def begin(self) -> None:
        """Begins a step."""
        self._missing = sum(len(message.gradients) for message in self._messages)

    def start(self, gradient: PlainGradient, incoming: torch.Tensor | None = None) -> None:
        """Takes note that a gradient is there; with the last one, all leave."""
        self._missing -= 1
        if not self._missing:
            self._send()

    @torch.no_grad()
    def finish(self, gradients: Iterable[PlainGradient], factor: float) -> int:
        """As DirectMeans's; the gradients are those of pack."""
        if not self._handles:
            self._send()
        updates: list[tuple[PlainGradient, torch.Tensor]] = []
        for message, handle in zip(self._messages, self._handles, strict=True):
            with profiled("wait"):
                synchronize(handle)
            if factor != 1:
                message.flat.mul_(factor)
            updates += zip(message.gradients, message.parts, strict=True)
        put_all(updates)
        self._handles = []
        return sum(message.flat.nbytes for message in self._messages)

    @torch.no_grad()
    def _send(self) -> None:
        for number, (gradients, flat, parts) in enumerate(self._messages):
            torch._foreach_copy_(parts, [_given(gradient) for gradient in gradients])
            name = f"{self._workers.prefix}.joint.{number}"
            self._handles.append(allreduce_async_(flat, name=name, **self._workers.averaging(flat.dtype)))


def _given(gradient: PlainGradient) -> torch.Tensor:
    """The gradient, or zeros where there is none."""
    gradient.make_zero()
    assert gradient.parameter.grad is not None
    return gradient.parameter.grad.to_dense()


def _message(gradients: list[PlainGradient], dtype: torch.dtype, device: torch.device) -> _Message:
    sizes = [gradient.parameter.numel() for gradient in gradients]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    parts = [part.view(gradient.parameter.shape) for part, gradient in zip(flat.split(sizes), gradients, strict=True)]
    return _Message(gradients, flat, parts)
