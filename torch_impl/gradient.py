"""What one parameter's gradient goes through in a step, and what is kept of it for the next one."""

from dataclasses import dataclass, replace
from typing import Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch

from horovod_powersgd import arrays
from horovod_powersgd.clipping import after_clipping
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.factors import initial_factor, resized
from horovod_powersgd.layout import Layout
from horovod_powersgd.randomness import SPARE, key_of, random_factor
from horovod_powersgd.statistics import residual
from horovod_powersgd.torch.adaptation import Adaptation
from horovod_powersgd.torch.clipping import Sample
from horovod_powersgd.torch.kernels import Memory, half_step, product
from horovod_powersgd.torch.ownership import owns_storage
from horovod_powersgd.torch.phase import phase
from horovod_powersgd.torch.workers import SparseMean, Workers


class PlainGradient:
    """A gradient that is averaged as it is.

    A step calls begin, send, receive, end and commit or discard, in this order; for a sparse gradient begin,
    send_sparse, receive_sparse, end and commit or discard.
    An exchange can wait for a gradient: it is done when backward has computed it.

    Attributes:
        arrived: whether backward has computed it in this step.
        incoming: what backward hands over, while the hook runs that was called with it.
        is_sparse: whether it is sparse in this step, and does not become dense.
        sparse_dim: of a sparse gradient; 0 where it is dense.
        overlaps: whether other parameters' gradients have memory in common with it.
    """

    compressed = False

    def __init__(self, name: str, parameter: torch.nn.Parameter, layout: Layout, sparse_as_dense: bool = False):
        self.name, self.parameter, self.layout = name, parameter, layout
        self.arrived = self.is_sparse = self.overlaps = False
        self.incoming: Optional[torch.Tensor] = None
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
        self.overlaps = False
        self._shared = not gradient.is_sparse and not owns_storage(gradient, self.incoming)
        # What is done to it here does not count as a change of it.
        self._dense = gradient.to_dense() if gradient.is_sparse else gradient.data

    @property
    def borrowed(self) -> Optional[torch.Tensor]:
        """The gradient, where its memory may be others', too."""
        return self.parameter.grad if self._shared else None

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
        flat = self._dense.to(self.sent_dtype).reshape(-1)
        return flat.clone() if self._shared and flat.data_ptr() == self._dense.data_ptr() else flat

    def receive(self, mean: torch.Tensor) -> None:
        """Takes the average of what was sent."""
        self._mean = mean.view(self._dense.shape)

    def end(self, finite: bool, factor: float, undoable: bool) -> None:
        """Ends an exchange: puts the average, times `factor`, into the gradient.

        Args:
            finite: whether all averages are, on all workers. Otherwise the step is to leave no trace.
            factor: W for the sum of all workers' gradients, else 1.
            undoable: whether the step may still be discarded. Otherwise commit follows.
        """
        gradient = self.parameter.grad
        if not gradient.is_sparse and self._mean.data_ptr() == gradient.data_ptr():
            if factor != 1:
                gradient.mul_(factor)
        else:
            self._put(self._mean if factor == 1 else self._mean * factor)
        self._mean = self._dense = None

    def _put(self, update: torch.Tensor) -> None:
        gradient = self.parameter.grad
        if gradient.is_sparse:
            gradient.zero_().add_(update if update.is_sparse else update.to(gradient.dtype).to_sparse())
        elif gradient.requires_grad:  # it is part of a graph, which may still need it
            self.parameter.grad = torch.empty_like(gradient, requires_grad=False).copy_(update)
        elif self.overlaps:
            gradient.set_(torch.empty_like(gradient).copy_(update))
        else:
            gradient.copy_(update)

    def sample(self) -> Optional[Tuple[Sample, torch.Tensor]]:
        """What tells by how much a changed update was clipped, and the update as it is now; None where it does not
        matter."""
        return None

    def commit(self, clipped: Optional[float] = None) -> None:
        """Keeps what the next step needs: the step is taken.

        Args:
            clipped: what the update has been multiplied by since end, 1 where it has not; None where that step could
                not be discarded, and nobody could clip.
        """

    def discard(self) -> None:
        """Leaves everything as it was before the step, which is not taken."""

    def scaled_by(self, scale: float) -> None:
        """Takes note, between end and commit, of what the loss was multiplied by, where it was not known before."""

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

    def take_over(self, other: "PlainGradient") -> None:
        """Takes what another gradient of the same parameter and configuration has kept, which ends."""


class StatefulGradient(PlainGradient):
    """A gradient of which something is kept from step to step.

    Attributes:
        adaptation: Accordion's part.
    """

    compressed = True

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, layout: Layout, config: Compressor, sparse_as_dense: bool
    ):
        super().__init__(name, parameter, layout, sparse_as_dense)
        self.adaptation = Adaptation(config, layout)
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self._key = key_of(name, config.seed)
        # What is kept; and what takes its place when the step is taken, there between end and commit or discard.
        self._kept = self._next = None
        self._sample: Optional[Sample] = None
        self._usual_clipping: Optional[float] = None

    def _mixed(self, old: "Kept", new: "Kept", weight: float) -> "Kept":
        """The new one with (1 - weight) times the old memory plus `weight` times its own."""
        raise NotImplementedError

    def sample(self) -> Optional[Tuple[Sample, torch.Tensor]]:
        gradient = self.parameter.grad
        if self._next is None or self._sample is None or gradient is None or gradient.is_sparse:
            return None
        return self._sample, gradient.reshape(self.layout.matrix_shape)

    def commit(self, clipped: Optional[float] = None) -> None:
        if self._next is None:
            return
        weight = 1.0
        if clipped is not None and self._sample is not None:
            weight, self._usual_clipping = after_clipping(clipped, self._usual_clipping)
        kept = self._next if weight == 1 else self._mixed(self._kept, self._next, weight)
        self._kept, self._next = kept, None
        self.adaptation.commit()

    def discard(self) -> None:
        self._next = None

    def take_over(self, other: PlainGradient) -> None:
        self._kept, self.adaptation, self._usual_clipping = other._kept, other.adaptation, other._usual_clipping


@dataclass(frozen=True)
class Kept:
    """What is kept of a matrix from step to step by PowerSGD.

    Attributes:
        factor: (r, m) or (r, n): the last averaged factor.
        is_q: which of the two it is.
        memory: None before the first step and without error feedback.
        scale: the loss scale of the step that the memory is from.
        own: (r, m) or (r, n): this worker's part of the factor; None before the first step.
    """

    factor: torch.Tensor
    is_q: bool
    memory: Optional[Memory] = None
    scale: float = 1.0
    own: Optional[torch.Tensor] = None


class MatrixGradient(StatefulGradient):
    """A gradient that travels as PowerSGD's factors, with its error-feedback memory and its last factor.

    An n x m matrix; factors are kept transposed, P as (r, n) and Q as (r, m), which lets every product with the
    gradient run near the speed of memory. The dtype of all of them is float64 for float64 parameters, else float32.
    A step calls start, begin, for each half-step multiply (with the basis of `mean`) and receive, end, and commit or
    discard.
    """

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        layout: Layout,
        config: Compressor,
        sparse_as_dense: bool = False,
    ):
        super().__init__(name, parameter, layout, config, sparse_as_dense)
        self._config, self._rank = config.family, layout.amount
        starting = initial_factor(name, layout.matrix_shape[1], self._rank, config.seed)
        self._kept = Kept(self._transposed(starting).to(self.dtype), True)
        self._spare_storage: Optional[torch.Tensor] = None
        self._spares: Dict[bool, torch.Tensor] = {}

    @property
    def memory(self) -> Optional[torch.Tensor]:
        """(n, m); None before the first step and without error feedback."""
        return None if self._kept.memory is None else self._kept.memory.tensor()

    @property
    def factor(self) -> torch.Tensor:
        """(r, m) or (r, n): the last averaged factor."""
        return self._kept.factor

    @property
    def factor_is_q(self) -> bool:
        """Which of the two it is."""
        return self._kept.is_q

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
        self._mean, self._mean_is_q = self._kept.factor, self._kept.is_q
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
            and not self._shared
            and gradient.dtype == self.dtype
            and gradient.is_contiguous()
        )
        if not self._in_place:
            gradient = gradient.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._delta, self._scale = gradient.view(self.layout.matrix_shape), scale
        self._added = self._kept.memory

    def multiply(self, basis: torch.Tensor) -> torch.Tensor:
        """A half-step: delta Q^ or delta^T P^, flat; in the first one the memory is added to delta on the way."""
        self._basis = basis
        with phase("p" if self._mean_is_q else "q"):
            own = half_step(self._delta, basis, not self._mean_is_q, self._added, self._scale / self._kept.scale)
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

    def end(self, finite: bool, factor: float, undoable: bool) -> None:
        """Puts the update P^ Q^T, times `factor`, into the gradient."""
        if self.is_sparse:
            return super().end(finite, factor, undoable)
        update, self._undoable, self._sample = self._delta, undoable, None
        if finite:
            memory = None
            if self._config.error_feedback:
                # Error feedback from this worker's own last factor.
                memory = Memory(self._delta, *self._p_and_q(self._own.to(self.dtype)))
                update = self._room()
            self._next = Kept(self._mean, self._mean_is_q, memory, self._scale, self._own)
        if finite or torch.isfinite(self._mean).all():
            p, q = self._p_and_q(self._mean if factor == 1 else self._mean * factor)
            with phase("update"):
                product(p, q, out=update)
        else:
            update.fill_(torch.nan)
        if finite:
            self.adaptation.end(update, 1 / (factor * self._scale))
            if undoable and self._config.error_feedback:
                self._sample = Sample.of_product(p, q)
        update = update.view(self.parameter.shape)
        if self._in_place:
            self.parameter.grad.set_(update)
        else:
            self._put(update)
        self._delta = self._basis = self._mean = self._own = None

    def _room(self) -> torch.Tensor:
        """(n, m) to write the update to: the old memory's, unless that may still be needed."""
        memory, spare, self._spare_storage = self._kept.memory, self._spare_storage, None
        if memory is not None and not self._undoable:
            return memory.storage()
        return torch.empty_like(self._delta) if spare is None else spare

    def _set_aside(self, memory: Optional[Memory]) -> None:
        """Keeps a memory's storage for the next update, where that is cheaper than to allocate it."""
        if memory is not None and self.parameter.device.type == "cpu":
            self._spare_storage = memory.storage()

    def _mixed(self, old: Kept, new: Kept, weight: float) -> Kept:
        memory = new.memory.tensor().mul_(weight)
        if old.memory is not None:
            memory.add_(old.memory.tensor(), alpha=(1 - weight) * new.scale / old.scale)
        return replace(new, memory=Memory(memory))

    def commit(self, clipped: Optional[float] = None) -> None:
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

    def _p_and_q(self, last: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The last half-step's factors, of which the basis is one."""
        return (self._basis, last) if self._mean_is_q else (last, self._basis)

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        kept = self._next or self._kept
        if kept.memory is None or kept.own is None:
            return None
        norms = (torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (kept.memory.tensor(), kept.own))
        return residual(*norms)

    def shared_state(self) -> Dict[str, object]:
        """What is the same on every worker, on the CPU."""
        factor = {"factor": self.factor.cpu().clone(), "factor_is_q": self.factor_is_q}
        return {**factor, **self.adaptation.state_dict()}

    def load_shared_state(self, state: Mapping) -> None:
        """Takes what another worker, or an earlier job, kept."""
        factor = state["factor"].to(self.factor, copy=True)
        self._kept = replace(self._kept, factor=factor, is_q=state["factor_is_q"])
        self.adaptation.load_state_dict(state, self.factor)

    def state_dict(self) -> Dict[str, object]:
        return {
            **super().state_dict(),
            **self.shared_state(),
            "memory": None if self.memory is None else self.memory.cpu().clone(),
            "memory_scale": self._kept.scale,
            "usual_clipping": self._usual_clipping,
        }

    def load_state_dict(self, state: Mapping, memories: Sequence[Tuple[torch.Tensor, float]], share: float) -> None:
        self.load_shared_state(state)
        self._usual_clipping = state.get("usual_clipping")
        scale = state["memory_scale"]
        memory = sum_of_memories(memories, share * scale, self.factor)
        self._kept = replace(self._kept, memory=None if memory is None else Memory(memory), scale=scale, own=None)


def sum_of_memories(
    memories: Sequence[Tuple[torch.Tensor, float]], weight: float, like: torch.Tensor
) -> Optional[torch.Tensor]:
    """The sum of (memory, its loss scale), each in scale 1, times `weight`, as `like` is; None of none."""
    total = None
    for memory, scale in memories:
        part = memory.to(like, copy=True).mul_(weight / scale)
        total = part if total is None else total.add_(part)
    return total
