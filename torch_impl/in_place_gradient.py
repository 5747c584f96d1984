"""A gradient whose compression takes no room: its storage becomes the memory, and the old memory's the update."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from horovod_powersgd.torch.compressed_gradient import CompressedGradient, sum_of_memories
from horovod_powersgd.torch.gradient import Copies
from horovod_powersgd.torch.half_memory import HalfMemory
from horovod_powersgd.torch.kernels import Memory


class InPlaceGradient(CompressedGradient):
    """A CompressedGradient that becomes delta in its own storage, where nobody else holds that, and then the memory.

    What is kept of it has a `memory`, None before the first step and without error feedback, and `scale`, the loss
    scale of the step that the memory is from.
    """

    _delta: Any  # of a step, which lets go of it in the end
    _undoable: bool
    _spare_storage: torch.Tensor | None = None
    # Of a memory that has 16 bits a number; then the gradient's storage becomes the update's.
    _halves: torch.dtype | None = None

    @property
    def memory(self) -> torch.Tensor | None:
        return None if self._kept.memory is None else self._kept.memory.tensor()

    @property
    def memory_scale(self) -> float:
        return self._kept.scale

    def begin(self, scale: float) -> None:
        """The gradient becomes delta, but for the memory, in its own storage where that can become the memory."""
        super().begin(scale)
        if self.is_sparse:
            return
        assert self.parameter.grad is not None
        gradient, self._dense = self._dense, None
        self._in_place = (
            not self.parameter.grad.is_sparse
            and not self._shared
            and gradient.dtype == self.dtype
            and gradient.is_contiguous()
        )
        if not self._in_place:
            gradient = gradient.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._delta, self._scale = gradient.view(self._matrix_shape), scale

    def _room(self) -> torch.Tensor:
        """(n, m) to write the update to, or a memory of 16 bits: the old memory's, unless that may still be needed."""
        memory, spare, self._spare_storage = self._kept.memory, self._spare_storage, None
        if memory is not None and not self._undoable:
            return memory.storage()
        return self._new_room() if spare is None else spare

    def _new_room(self) -> torch.Tensor:
        return torch.empty_like(self._delta, dtype=self._halves)

    def _memory_of(self, memory: torch.Tensor) -> Memory:
        """What is kept of it."""
        return Memory(memory) if self._halves is None else HalfMemory.of(memory, self._halves)

    def _hand_over(self, update: torch.Tensor, copies: Copies) -> None:
        """Lets the gradient be the update, (n, m)."""
        assert self.parameter.grad is not None
        written = update.view(self.parameter.shape)
        if self._in_place:
            self.parameter.grad.set_(written)  # type: ignore[call-overload]  # PyTorch names storages only
        else:
            self.put(written, copies)
        self._delta = None

    def _set_aside(self, memory: Memory | None) -> None:
        """Keeps a memory's storage for the next update, where that is cheaper than to allocate it."""
        if memory is not None and self.parameter.device.type == "cpu":
            self._spare_storage = memory.storage()

    def _mixed(self, old, new, weight: float):
        memory = new.memory.tensor().mul_(weight)
        if old.memory is not None:
            memory.add_(old.memory.tensor(), alpha=(1 - weight) * new.scale / old.scale)
        return replace(new, memory=self._memory_of(memory))

    def commit(self, clipped: float | None = None) -> None:
        old = self._kept.memory if self._next is not None and self._undoable else None
        super().commit(clipped)
        self._set_aside(old)

    def discard(self) -> None:
        if self._next is not None:
            self._set_aside(self._next.memory)
        super().discard()

    def scaled_by(self, scale: float) -> None:
        if self._next is not None:
            self._next = replace(self._next, scale=scale)

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        self.load_shared_state(state)
        self._usual_clipping = state.get("usual_clipping")
        scale, like = state["memory_scale"], torch.empty(0, dtype=self.dtype, device=self.parameter.device)
        memory = sum_of_memories(memories, weight * scale, like)
        self._kept = replace(self._kept, memory=None if memory is None else self._memory_of(memory), scale=scale)
