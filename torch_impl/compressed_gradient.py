"""A gradient that travels as a compressor's generator says."""

from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch

from horovod_powersgd.compressor import AllreduceMean, Compressor
from horovod_powersgd.layout import Layout
from horovod_powersgd.randomness import key_of
from horovod_powersgd.state import TensorState
from horovod_powersgd.torch import arrays
from horovod_powersgd.torch.adaptation import Adaptation
from horovod_powersgd.torch.gradient import PlainGradient, sum_of_memories
from horovod_powersgd.torch.workers import Workers


class CompressedGradient(PlainGradient):
    """reference.exchange of one matrix, with its error-feedback memory and what the compressor keeps.

    A step calls start, begin, then, as long as there is a request, parts and go_on, and end.

    Attributes:
        memory: (n, m), float64 for float64 parameters, else float32; None before the first step and without error
            feedback.
        kept: what the compressor keeps, the same on every worker.
        adaptation: Accordion's part.
        request: what the generator asks for; None at its end.
    """

    compressed = True

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        layout: Layout,
        config: Compressor,
        sparse_as_dense: bool = False,
    ):
        super().__init__(name, parameter, layout, sparse_as_dense)
        self._config, self._key = config, key_of(name, config.seed)
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.memory: Optional[torch.Tensor] = None
        self.kept: Dict[str, torch.Tensor] = {}
        self.adaptation = Adaptation(config, layout)
        self.request = None
        self._norm: Optional[torch.Tensor] = None

    @property
    def kind(self) -> Tuple:
        # Not with the gradients that are averaged as they are, nor with those that travel in another precision.
        return "compressed", self.dtype, self.parameter.device

    def start(self, step: int, rate: Optional[float], workers: Workers) -> None:
        """Takes what is known before the gradient is there; `rate` is the learning rate."""
        self._state = TensorState(arrays, self.name, self.layout.matrix_shape, self._key, self.kept, self._to_tensor)
        self._state.begin(step, self.adaptation.amount(step, rate), workers.index, workers.count, True)

    def begin(self, scale: float) -> None:
        super().begin(scale)
        if self.is_sparse:
            return
        # A compressor sees gradients of the loss as it is: what it keeps, and signs among others, know of no scale.
        delta, self._dense, self._scale = self._dense.to(self.dtype).reshape(self.layout.matrix_shape), None, scale
        if scale != 1:
            delta = delta / scale
        if self.memory is not None:
            delta = delta + self.memory
        self._finite = self._state.finite = torch.isfinite(delta).all()
        self._delta = torch.where(self._finite, delta, 0)
        self._failed = torch.zeros_like(self._finite)
        self._generator = self._config.family.exchange(self._delta, self._state)
        self._resume(None)

    def parts(self) -> List[torch.Tensor]:
        """What is asked for, to be sent: no floats are numbers where this worker's delta was not finite."""
        request = self.request
        tensors = [request.tensors] if isinstance(request, AllreduceMean) else list(request.tensors)
        return [torch.where(self._finite, t, torch.nan) if t.is_floating_point() else t for t in tensors]

    def go_on(self, answers: List[torch.Tensor]) -> None:
        """Takes the answer to parts. What is not finite goes on as zeros, on this worker as on all others."""
        for i, part in enumerate(answers):
            if part.is_floating_point():
                finite = torch.isfinite(part).all()
                self._failed |= ~finite
                answers[i] = torch.where(finite, part, 0)
        self._resume(answers[0] if isinstance(self.request, AllreduceMean) else answers)

    def _resume(self, answer) -> None:
        try:
            self.request = self._generator.send(answer)
        except StopIteration as finished:
            self.request = self._generator = None
            update, self._sent = finished.value
            self._mean = torch.where(self._failed, torch.nan, update).reshape(self.layout.matrix_shape)

    def _to_tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.parameter.device)

    def fits(self, factor: float) -> torch.Tensor:
        if self.is_sparse:
            return super().fits(factor)
        return torch.isfinite((self._mean * (factor * self._scale)).half()).all()

    def finite(self) -> torch.Tensor:
        """Whether the update is; a boolean on the device, the same on every worker."""
        return torch.isfinite(self._mean).all()

    def end(self, finite: bool, factor: float) -> None:
        """Puts the update, times `factor`, into the gradient; a finite step's memory and state are kept."""
        if not self.is_sparse:
            if finite:
                self._keep()
            factor *= self._scale
            self._put((self._mean if factor == 1 else self._mean * factor).view(self.parameter.shape))
            self._delta = self._sent = self._mean = self._state = None
            return
        super().end(finite, factor)

    def _keep(self) -> None:
        self.kept = self._state.kept
        self.adaptation.keep(self._mean, 1.0)
        if self._config.keeps_memory:
            self.memory = self._delta - self._sent.reshape(self._delta.shape)
        if self._config.error_feedback:
            self._norm = torch.linalg.vector_norm(self._delta, dtype=torch.float64)

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        if self._norm is None:
            return None
        left = torch.linalg.vector_norm(self.memory, dtype=torch.float64)
        return (left / self._norm).item() if self._norm else 0.0

    def shared_state(self) -> Dict[str, object]:
        """What is the same on every worker, on the CPU."""
        kept = {key: torch.as_tensor(value).cpu().clone() for key, value in self.kept.items()}
        return {"kept": kept, **self.adaptation.state_dict()}

    def load_shared_state(self, state: Mapping) -> None:
        """Takes what another worker, or an earlier job, kept."""
        like = torch.empty(0, dtype=self.dtype, device=self.parameter.device)
        self.kept = {key: value.to(self.parameter.device, copy=True) for key, value in state["kept"].items()}
        self.adaptation.load_state_dict(state, like)

    def state_dict(self) -> Dict[str, object]:
        return {
            **super().state_dict(),
            **self.shared_state(),
            "memory": None if self.memory is None else self.memory.cpu().clone(),
            "memory_scale": 1.0,
        }

    def load_state_dict(self, state: Mapping, memories: Sequence[Tuple[torch.Tensor, float]], share: float) -> None:
        self.load_shared_state(state)
        self._norm = None
        like = torch.empty(0, dtype=self.dtype, device=self.parameter.device)
        self.memory = sum_of_memories(memories, share, like)
