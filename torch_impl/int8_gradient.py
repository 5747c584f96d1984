"""A gradient that travels in 8 bits a number: the fast twin of Int8.exchange."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.precision import Int8
from horovod_powersgd.layout import Layout
from horovod_powersgd.quantization import rows_of
from horovod_powersgd.torch.clipping import Sample
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.gradient import Copies
from horovod_powersgd.torch.in_place_gradient import InPlaceGradient
from horovod_powersgd.torch.kernels import Memory
from horovod_powersgd.torch.quantization import Part


@dataclass(frozen=True)
class Kept:
    """What is kept of a matrix from step to step.

    Attributes:
        memory: None before the first step and without error feedback.
        scale: the loss scale of the step that the memory is from.
        norm: |delta| of the last step, a number or a scalar; None where there was none.
    """

    memory: Memory | None = None
    scale: float = 1.0
    norm: Any = None


class Int8Gradient(InPlaceGradient):
    """A gradient that travels in 8 bits a number.

    A step calls begin, part, of which only what was not sent is left then, take, end, and commit or discard.
    """

    # Of a step, which lets go of them in the end.
    _write: Any
    _norm: Any

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, layout: Layout, config: Compressor, sparse_as_dense: bool
    ):
        super().__init__(name, parameter, layout, config, sparse_as_dense)
        assert isinstance(config, Int8)
        self._config, self._kept = config, Kept()

    @property
    def kind(self) -> tuple:
        # Not with the gradients that are averaged as they are.
        return "compressed", self.dtype, self.parameter.device

    @property
    def rows(self) -> list[tuple[int, int]]:
        """quantization.rows_of the matrix."""
        return rows_of([self.parameter.numel()], self._config.block)

    def part(self) -> Part:
        """What is to be averaged of it."""
        memory = None if self.memory is None else self.memory.view(-1)
        return Part(self._delta.view(-1), memory, self._scale / self._kept.scale)

    def take(self, norm: Any, write: Callable[[torch.Tensor], object]) -> None:
        """Takes the norm of what was to be averaged, and what writes the average to a flat tensor."""
        self._norm, self._write = norm, write

    def fits(self, factor: float) -> torch.Tensor:
        if self.is_sparse:
            return super().fits(factor)
        mean = self._delta.new_empty(self._delta.numel())
        self._write(mean)
        return all_finite((mean * factor).half())

    def end(self, finite: bool, factor: float, undoable: bool, copies: Copies) -> None:
        """Puts the average, times `factor`, into the gradient."""
        if self.is_sparse:
            return super().end(finite, factor, undoable, copies)
        update, self._undoable, self._sample = self._delta, undoable, None
        if finite:
            memory = None
            if self._config.error_feedback:
                memory, update = Memory(self._delta), self._room()
            self._next = Kept(memory, self._scale, self._norm)
        self._write(update.view(-1))
        if factor != 1:
            update.mul_(factor)
        if finite and undoable and self._config.error_feedback:
            self._sample = Sample.of_matrix(update)
        self._hand_over(update, copies)
        self._write = None

    def residual(self) -> float | None:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        kept = self._next or self._kept
        if kept.memory is None or kept.norm is None:
            return None
        left, norm = torch.linalg.vector_norm(kept.memory.tensor(), dtype=torch.float64).item(), float(kept.norm)
        return left / norm if norm else 0.0

    def shared_state(self) -> dict[str, Any]:
        return {}

    def load_shared_state(self, state: Mapping) -> None:
        """Takes nothing: what workers have in common is the configuration."""

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        super().load_state_dict(state, memories, weight)
        self._kept = replace(self._kept, norm=None)
