"""What one parameter's gradient goes through in a step, and what is kept of it for the next one."""

from typing import Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch

from horovod_powersgd import arrays
from horovod_powersgd.compressor import Compressor
from horovod_powersgd.layout import Layout
from horovod_powersgd.randomness import SPARE, key_of, random_factor
from horovod_powersgd.reference import initial_factor, resized
from horovod_powersgd.statistics import residual
from horovod_powersgd.torch.adaptation import Adaptation
from horovod_powersgd.torch.kernels import Memory, half_step, product
from horovod_powersgd.torch.phase import phase
from horovod_powersgd.torch.workers import SparseMean, Workers


class PlainGradient:
    """A gradient that is averaged as it is.

    A step calls begin, send, receive and end, in this order; for a sparse gradient begin, send_sparse, receive_sparse
    and end.
    An exchange can wait for a gradient: it is done when backward has computed it.

    Attributes:
        arrived: whether backward has computed it in this step.
        is_sparse: whether it is sparse in this step, and does not become dense.
        sparse_dim: of a sparse gradient; 0 where it is dense.
    """

    compressed = False

    def __init__(self, name: str, parameter: torch.nn.Parameter, layout: Layout, sparse_as_dense: bool = False):
        self.name, self.parameter, self.layout = name, parameter, layout
        self.arrived = self.is_sparse = False
        self.sparse_dim = 0
        self._sparse_as_dense = sparse_as_dense

    @property
    def sent_dtype(self) -> torch.dtype:
        """Of what Horovod is given; it does not reduce bfloat16."""
        return torch.float32 if self.parameter.dtype == torch.bfloat16 else self.parameter.dtype

    @property
    def nbytes(self) -> int:
        """Of a dense gradient."""
        return self.parameter.numel() * self.parameter.element_size()

    @property
    def kind(self) -> Tuple[torch.dtype, torch.device]:
        """What the gradients of a bucket have in common."""
        return self.sent_dtype, self.parameter.device

    def done(self) -> bool:
        """Whether backward has computed the gradient."""
        return self.arrived

    def result(self) -> torch.Tensor:
        """The gradient."""
        return self.parameter.grad

    def make_zero(self) -> None:
        """Makes a gradient of zeros, where backward computed none: another worker may have."""
        zeros = torch.zeros_like(self.parameter)
        self.parameter.grad = zeros.to_sparse(self.sparse_dim) if self.sparse_dim else zeros

    def begin(self, scale: float) -> None:
        """Takes the gradient, which is here; `scale` is what the loss, and so the gradient, is multiplied by."""
        gradient = self.parameter.grad
        self.is_sparse = gradient.is_sparse and not self._sparse_as_dense
        self.sparse_dim = gradient.sparse_dim() if self.is_sparse else 0
        if not gradient.is_sparse and 0 in gradient.stride() and gradient.numel() > 1:
            # An expanded tensor has no room for what its elements are going to be.
            gradient = self.parameter.grad = gradient.contiguous()
        self._dense = gradient.to_dense() if gradient.is_sparse else gradient

    def send_sparse(self, workers: Workers, turn: bool) -> Tuple[SparseMean, int]:
        """Starts averaging a sparse gradient by gathering, as Horovod does; also gives the bytes handed to it."""
        gradient = self.parameter.grad.coalesce()
        indices, values = gradient.indices(), gradient.values().to(PlainGradient.sent_dtype.fget(self))
        self._sparse_bytes = indices.nbytes + values.nbytes
        return workers.sparse_mean(indices, values, gradient.shape, self.name, turn), self._sparse_bytes

    def receive_sparse(self, average: torch.Tensor) -> None:
        """Takes the average of a sparse gradient."""
        self._mean = average.to(self.parameter.dtype)

    def fits(self, factor: float) -> torch.Tensor:
        """Whether the average, times `factor`, is finite in half precision; a boolean on the device."""
        update = self._mean if self._mean.layout == torch.strided else self._mean.values()
        return torch.isfinite(update * factor).all()

    def uncompressed_bytes(self) -> int:
        """What Horovod would have been handed."""
        return self._sparse_bytes if self.is_sparse else self.nbytes

    def send(self) -> torch.Tensor:
        """What the next round averages, flat: here the gradient, where possible in its own storage."""
        return self._dense.to(self.sent_dtype).reshape(-1)

    def receive(self, mean: torch.Tensor) -> None:
        """Takes the average of what was sent."""
        self._mean = mean.view(self._dense.shape)

    def end(self, finite: bool, factor: float) -> None:
        """Ends a step: puts the average, times `factor`, into the gradient."""
        gradient = self.parameter.grad
        if gradient.is_sparse or self._mean.data_ptr() != gradient.data_ptr():
            self._put(self._mean)
        if factor != 1:
            gradient.mul_(factor)
        self._mean = self._dense = None

    def _put(self, update: torch.Tensor) -> None:
        gradient = self.parameter.grad
        if gradient.is_sparse:
            gradient.zero_().add_(update if update.is_sparse else update.to(gradient.dtype).to_sparse())
        else:
            gradient.copy_(update)

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step: nothing is left out."""
        return 0.0

    def state_dict(self) -> Dict[str, object]:
        """What is kept for the next step; on the CPU."""
        return {"shape": list(self.layout.shape)}

    def load_state_dict(self, state: Mapping, memories: Sequence[Tuple[torch.Tensor, float]], share: float) -> None:
        """Takes what another gradient of this shape kept.

        Args:
            state: from state_dict.
            memories: (memory, its loss scale) of the workers that this one stands for, and
            share: what their sum is multiplied by.
        """


class MatrixGradient(PlainGradient):
    """A gradient that travels as PowerSGD's factors, with its error-feedback memory and its last factor.

    An n x m matrix; factors are kept transposed, P as (r, n) and Q as (r, m), which lets every product with the
    gradient run near the speed of memory. The dtype of all of them is float64 for float64 parameters, else float32.
    A step calls start, begin, for each half-step multiply (with the basis of `mean`) and receive, and end.

    Attributes:
        memory_scale: the loss scale of the step that the memory is from.
        factor: (r, m) or (r, n): the last averaged factor.
        factor_is_q: which of the two it is.
        adaptation: Accordion's part.
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
        self._config, self._rank = config.family, layout.amount
        self.adaptation = Adaptation(config, layout)
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self._memory: Optional[Memory] = None
        self.memory_scale = 1.0
        self._key = key_of(name, config.seed)
        starting = initial_factor(name, layout.matrix_shape[1], self._rank, config.seed)
        self.factor, self.factor_is_q = self._transposed(starting).to(self.dtype), True
        self._spares: Dict[bool, torch.Tensor] = {}
        self._own: Optional[torch.Tensor] = None

    @property
    def memory(self) -> Optional[torch.Tensor]:
        """(n, m); None before the first step and without error feedback."""
        return None if self._memory is None else self._memory.tensor()

    @property
    def sent_dtype(self) -> torch.dtype:
        return torch.float16 if self._config.wire_dtype == "float16" else self.dtype

    def _random(self, step: int, length: int) -> torch.Tensor:
        """(r, length) float64."""
        return self._transposed(random_factor(arrays, self._key, step, length, self._rank))

    def _transposed(self, factor: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(factor.T.copy()).to(self.parameter.device)

    def spare(self) -> torch.Tensor:
        """Random rows (r, n or m) float64, for those of the mean that are not independent."""
        if self._mean_is_q not in self._spares:
            self._spares[self._mean_is_q] = self._random(SPARE, self._mean.shape[1])
        return self._spares[self._mean_is_q]

    def start(self, step: int, renews: bool, rate: Optional[float]) -> None:
        """Takes as mean the factor that the first half-step starts from.

        Args:
            step: how many steps were exchanged before.
            renews: whether the subspace is sought anew.
            rate: the learning rate, where it is known.
        """
        rank = self.adaptation.amount(step, rate)
        if rank != self._rank:
            self._rank = rank
            self._spares.clear()
        self._mean, self._mean_is_q = self.factor, self.factor_is_q
        if renews or not self._config.warm_start:
            self._mean, self._mean_is_q = self._random(step, self.layout.matrix_shape[1]).to(self.dtype), True
        elif len(self._mean) != rank:
            factor = resized(self._mean.t().cpu().numpy(), rank, self.spare().t().cpu().numpy())
            self._mean = torch.from_numpy(factor).t().contiguous().to(self._mean.device)

    def begin(self, scale: float) -> None:
        """The gradient becomes delta, in its own storage where that can become the memory."""
        super().begin(scale)
        if self.is_sparse:
            return
        gradient, self._dense = self._dense, None
        self._in_place = (
            not self.parameter.grad.is_sparse
            and gradient.dtype == self.dtype
            and gradient.is_contiguous()
            and gradient.untyped_storage().nbytes() == gradient.nbytes
        )
        if not self._in_place:
            gradient = gradient.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._delta, self._scale = gradient.view(self.layout.matrix_shape), scale
        self._added = self._memory

    def multiply(self, basis: torch.Tensor) -> torch.Tensor:
        """A half-step: delta Q^ or delta^T P^, flat; in the first one the memory is added to delta on the way."""
        self._basis = basis
        with phase("p" if self._mean_is_q else "q"):
            own = half_step(self._delta, basis, not self._mean_is_q, self._added, self._scale / self.memory_scale)
        self._own, self._added = own.to(self.sent_dtype), None
        return self._own.view(-1)

    def receive(self, mean: torch.Tensor) -> None:
        self._mean = mean.view(self._rank, -1).to(self.dtype)
        self._mean_is_q = not self._mean_is_q

    @property
    def mean(self) -> torch.Tensor:
        """(r, n) or (r, m): the factor that was last averaged, in this step or before it."""
        return self._mean

    def fits(self, factor: float) -> torch.Tensor:
        if self.is_sparse:
            return super().fits(factor)
        p, q = self._p_and_q(self._mean)
        return torch.isfinite((p.t() @ (q * factor)).half()).all()

    def end(self, finite: bool, factor: float) -> None:
        """Puts the update P^ Q^T, times `factor`, into the gradient; a finite step's memory and factor are kept."""
        if self.is_sparse:
            return super().end(finite, factor)
        update = self._delta
        if finite:
            self.factor, self.factor_is_q = self._mean, self._mean_is_q
            if self._config.error_feedback:
                update = torch.empty_like(self._delta) if self._memory is None else self._memory.storage()
                # Error feedback from this worker's own last factor.
                self._memory = Memory(self._delta, *self._p_and_q(self._own.to(self.dtype)))
                self.memory_scale = self._scale
        if finite or torch.isfinite(self._mean).all():
            p, q = self._p_and_q(self._mean)
            with phase("update"):
                product(p, q if factor == 1 else q * factor, out=update)
        else:
            update.fill_(torch.nan)
        if finite:
            self.adaptation.keep(update, 1 / (factor * self._scale))
        update = update.view(self.parameter.shape)
        if self._in_place:
            self.parameter.grad.set_(update)
        else:
            self._put(update)
        self._delta = self._basis = self._mean = None

    def _p_and_q(self, last: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The last half-step's factors, of which the basis is one."""
        return (self._basis, last) if self._mean_is_q else (last, self._basis)

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        if self._memory is None or self._own is None:
            return None
        return residual(*(torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (self.memory, self._own)))

    def shared_state(self) -> Dict[str, object]:
        """What is the same on every worker, on the CPU."""
        factor = {"factor": self.factor.cpu().clone(), "factor_is_q": self.factor_is_q}
        return {**factor, **self.adaptation.state_dict()}

    def load_shared_state(self, state: Mapping) -> None:
        """Takes what another worker, or an earlier job, kept."""
        self.factor, self.factor_is_q = state["factor"].to(self.factor, copy=True), state["factor_is_q"]
        self.adaptation.load_state_dict(state, self.factor)

    def state_dict(self) -> Dict[str, object]:
        return {
            **super().state_dict(),
            **self.shared_state(),
            "memory": None if self._memory is None else self.memory.cpu().clone(),
            "memory_scale": self.memory_scale,
        }

    def load_state_dict(self, state: Mapping, memories: Sequence[Tuple[torch.Tensor, float]], share: float) -> None:
        self.load_shared_state(state)
        self.memory_scale, self._own = state["memory_scale"], None
        memory = sum_of_memories(memories, share * self.memory_scale, self.factor)
        self._memory = None if memory is None else Memory(memory)


def sum_of_memories(
    memories: Sequence[Tuple[torch.Tensor, float]], weight: float, like: torch.Tensor
) -> Optional[torch.Tensor]:
    """The sum of (memory, its loss scale), each in scale 1, times `weight`, as `like` is; None of none."""
    total = None
    for memory, scale in memories:
        part = memory.to(like, copy=True).mul_(weight / scale)
        total = part if total is None else total.add_(part)
    return total
