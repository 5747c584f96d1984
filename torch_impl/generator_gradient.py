"""A gradient that travels as a compressor's generator says."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.matrix_state import MatrixState
from horovod_powersgd.layout import Layout
from horovod_powersgd.torch import arrays
from horovod_powersgd.torch.clipping import Sample
from horovod_powersgd.torch.compressed_gradient import CompressedGradient, sum_of_memories
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.gradient import Copies
from horovod_powersgd.torch.workers import Workers


@dataclass(frozen=True)
class Kept:
    """What is kept of a matrix from step to step.

    Attributes:
        by_compressor: what the compressor keeps, the same on every worker.
        memory: (n, m), float64 for float64 parameters, else float32; None before the first step and without error
            feedback.
        norm: |delta| of the last step; None where there was none or no memory is kept.
    """

    by_compressor: dict[str, torch.Tensor] = field(default_factory=dict)
    memory: torch.Tensor | None = None
    norm: torch.Tensor | None = None


class GeneratorGradient(CompressedGradient):
    """reference.exchange of one matrix, with its error-feedback memory and what the compressor keeps.

    A step calls start, begin, then, as long as there is a request, parts and go_on, then end, and commit or discard.

    Attributes:
        request: what the generator asks for; None at its end.
    """

    # Of a step, which lets go of them in the end.
    _state: Any
    _delta: Any
    _sent: Any
    _generator: Generator | None

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        layout: Layout,
        config: Compressor,
        sparse_as_dense: bool = False,
    ):
        super().__init__(name, parameter, layout, config, sparse_as_dense)
        self._config, self._kept = config, Kept()
        self.request: AllreduceMean | QuantizedMean | Allgather | None = None

    @property
    def memory(self) -> torch.Tensor | None:
        return self._kept.memory

    @property
    def kind(self) -> tuple:
        # Not with the gradients that are averaged as they are, nor with those that travel in another precision.
        return "compressed", self.dtype, self.parameter.device

    def start(self, step: int, rate: float | None, workers: Workers) -> None:
        """Takes what is known before the gradient is there; `rate` is the learning rate."""
        kept = self._kept.by_compressor
        self._state = MatrixState(arrays, self.name, self._matrix_shape, self._key, kept, self._to_tensor)
        self._state.begin(step, self.accordion.amount(step, rate), workers.index, workers.count, True)

    def begin(self, scale: float) -> None:
        super().begin(scale)
        if self.is_sparse:
            return
        # A compressor sees gradients of the loss as it is: what it keeps, and signs among others, know of no scale.
        delta, self._dense, self._scale = self._dense.to(self.dtype).reshape(self._matrix_shape), None, scale
        if scale != 1:
            delta = delta / scale
        # Never the gradient itself: what a generator is given, it may change.
        delta = delta.clone() if self.memory is None else delta + self.memory
        self._finite = self._state.finite = all_finite(delta)
        self._delta = _if(self._finite, delta, 0)
        self._failed = torch.zeros_like(self._finite)
        self._generator = self._config.family.exchange(self._delta, self._state)
        self._resume(None)

    def parts(self) -> list[torch.Tensor]:
        """What is asked for, to be sent: floats become NaN where this worker's delta was not finite."""
        request = self.request
        assert request is not None
        tensors = list(request.tensors) if isinstance(request, Allgather) else [request.tensors]
        return [_if(self._finite, t, torch.nan) if t.is_floating_point() else t for t in tensors]

    def go_on(self, answers: list[torch.Tensor]) -> None:
        """Takes the answer. What is not finite goes on as zeros, on all workers: they let the generator finish, and the
        step is discarded."""
        for i, part in enumerate(answers):
            if part.is_floating_point():
                finite = all_finite(part)
                self._failed = torch.logical_or(self._failed, torch.logical_not(finite))
                answers[i] = _if(finite, part, 0)
        self._resume(answers[0] if isinstance(self.request, AllreduceMean) else answers)

    def _resume(self, answer) -> None:
        assert self._generator is not None
        try:
            self.request = self._generator.send(answer)
        except StopIteration as finished:
            self.request = self._generator = None
            update, self._sent = finished.value
            self._mean = _if(torch.logical_not(self._failed), update, torch.nan).reshape(self._matrix_shape)

    def _to_tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.parameter.device)

    def fits(self, factor: float) -> torch.Tensor:
        if self.is_sparse:
            return super().fits(factor)
        return all_finite((self._mean * (factor * self._scale)).half())

    def finite(self) -> torch.Tensor:
        """Whether the update is; a boolean on the device, the same on every worker."""
        return all_finite(self._mean)

    def end(self, finite: bool, factor: float, undoable: bool, copies: Copies) -> None:
        """Puts the update, times `factor`, into the gradient."""
        if self.is_sparse:
            return super().end(finite, factor, undoable, copies)
        self._sample = None
        factor *= self._scale
        update = self._mean if factor == 1 else self._mean * factor
        if finite:
            norm = torch.linalg.vector_norm(self._delta) if self._config.error_feedback else None
            self._next = Kept(self._state.kept, self._left() if self._config.keeps_memory else None, norm)
            self.accordion.end(self._mean, 1.0)
            if undoable and self._config.keeps_memory:
                self._sample = Sample.of_matrix(update)
        self.put(update.view(self.parameter.shape), copies)
        self._delta = self._sent = self._mean = self._state = None

    def _left(self) -> torch.Tensor:
        """What of delta was not sent: in its storage, where no other tensor of the step is in that."""
        sent = self._sent.reshape(self._delta.shape)
        others = [sent, self._mean, *(t for t in self._state.kept.values() if torch.is_tensor(t))]
        mine = self._delta.untyped_storage()._cdata
        shared = any(other.untyped_storage()._cdata == mine for other in others)
        return self._delta - sent if shared else self._delta.sub_(sent)

    def _mixed(self, old: Kept, new: Kept, weight: float) -> Kept:
        assert new.memory is not None
        memory = new.memory * weight
        return replace(new, memory=memory if old.memory is None else memory + old.memory * (1 - weight))

    def scaled_by(self, scale: float) -> None:
        if self._next is not None and self._next.memory is not None:
            self._next = replace(self._next, memory=self._next.memory / scale)

    def residual(self) -> float | None:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        kept = self._next or self._kept
        if kept.norm is None or kept.memory is None:
            return None
        left = torch.linalg.vector_norm(kept.memory, dtype=torch.float64)
        return (left / kept.norm).item() if kept.norm else 0.0

    def shared_state(self) -> dict[str, Any]:
        kept = {key: torch.as_tensor(value).cpu().clone() for key, value in self._kept.by_compressor.items()}
        return {"kept": kept, **self.accordion.state_dict()}

    def load_shared_state(self, state: Mapping) -> None:
        like = torch.empty(0, dtype=self.dtype, device=self.parameter.device)
        kept = {key: value.to(self.parameter.device, copy=True) for key, value in state["kept"].items()}
        self._kept = replace(self._kept, by_compressor=kept)
        self.accordion.load_state_dict(state, like)

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        self.load_shared_state(state)
        self._usual_clipping = state.get("usual_clipping")
        like = torch.empty(0, dtype=self.dtype, device=self.parameter.device)
        self._kept = replace(self._kept, memory=sum_of_memories(memories, weight, like), norm=None)


def _if(condition: torch.Tensor, tensor: torch.Tensor, otherwise: float) -> torch.Tensor:
    """The tensor where the condition holds, else one that is filled with a number. On a processor the condition is
    looked at; elsewhere the host would have to wait for it."""
    if tensor.device.type == "cpu":
        return tensor if condition else torch.full_like(tensor, otherwise)
    return torch.where(condition, tensor, otherwise)
