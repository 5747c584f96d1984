"""A gradient that travels as PowerSGD's factors: the fast twin of PowerSGD.exchange."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from horovod_powersgd import arrays
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD, scale_of_halves
from horovod_powersgd.factors import initial_factor, resized
from horovod_powersgd.hosts import RowShare
from horovod_powersgd.layout import Layout
from horovod_powersgd.randomness import SPARE, random_factor
from horovod_powersgd.statistics import residual
from horovod_powersgd.torch import arrays as tensors
from horovod_powersgd.torch.clipping import Sample
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.gradient import Copies
from horovod_powersgd.torch.half_memory import Drawn, Keep, keep
from horovod_powersgd.torch.in_place_gradient import InPlaceGradient
from horovod_powersgd.torch.kernels import HalfStep, Memory, Product, products
from horovod_powersgd.torch.profiling import profiled


@dataclass(frozen=True)
class Kept:
    """What is kept of a matrix from step to step by PowerSGD.

    Attributes:
        factor: (r, m) or (r, n): the last averaged factor.
        is_q: which of the two it is.
        memory: None before the first step and without error feedback.
        scale: the loss scale of the step that the memory is from.
        own: (r, m) or (r, n): this worker's part of the factor; None before the first step. Of a TwoLevelGradient: both
            factors of what was sent.
        share: of a TwoLevelGradient: whose rows the memory has; None: all.
    """

    factor: torch.Tensor
    is_q: bool
    memory: Memory | None = None
    scale: float = 1.0
    own: Any = None
    share: RowShare | None = None

    def to(self, device: torch.device) -> "Kept":
        """The same on another device."""
        memory = None if self.memory is None else self.memory.to(device)
        return replace(self, factor=self.factor.to(device), memory=memory, own=None)


class PowerSGDGradient(InPlaceGradient):
    """A gradient that travels as PowerSGD's factors, with its error-feedback memory and its last factor.

    An n x m matrix; factors are kept transposed, P as (r, n) and Q as (r, m), which lets every product with the
    gradient run near the speed of memory. The dtype of all of them is float64 for float64 parameters, else float32.
    A step calls start, begin, for each half-step half_step (with a basis of `mean`), made and receive, end, and commit
    or discard.
    """

    # Of a step, which lets go of them in the end.
    _basis: Any
    _own: Any
    _scale_of_halves: torch.Tensor | None = None  # where the next factor travels in half precision
    _place: tuple[int, int]
    _drawn: Drawn | None = None  # where the memory has 16 bits a number

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        layout: Layout,
        config: Compressor,
        sparse_as_dense: bool = False,
    ):
        super().__init__(name, parameter, layout, config, sparse_as_dense)
        assert isinstance(config.family, PowerSGD)
        self._config, self._rank = config.family, layout.amount
        starting = initial_factor(name, self._matrix_shape[1], self._rank, config.seed)
        self._kept = Kept(self._transposed(starting).to(self.dtype), True)
        self._spares: dict[bool, torch.Tensor] = {}
        if self._config.memory_dtype is not None:
            self._halves = getattr(torch, self._config.memory_dtype)

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
        # Of the first step, too, for the order of the buckets.
        return torch.float16 if self._config.wire_dtype == "float16" else self.dtype

    @property
    def sends_halves(self) -> bool:
        """Whether the next factor travels in half precision."""
        return self._scale_of_halves is not None

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

    def start(self, step: int, renews: bool, rate: float | None, worker: int) -> None:
        """Takes as mean the factor that the first half-step starts from.

        Args:
            step: how many steps were exchanged before.
            renews: whether the subspace is sought anew.
            rate: the learning rate, where it is known.
            worker: this one's number; in an exchange of two levels, its host's.
        """
        self._place = step, worker
        if self._kept.factor.device != self.parameter.device:  # the model was moved after the optimizer had been made
            self._kept = self._kept.to(self.parameter.device)
        rank = self.accordion.amount(step, rate)
        if rank != self._rank:
            self._rank = rank
            self._spares.clear()
        self._mean, self._mean_is_q = self._kept.factor, self._kept.is_q
        self._sends_halves = self._config.sends_halves(step)
        self._take_scale_of_halves(to_q=not self._mean_is_q and not renews and self._config.warm_start)
        if renews or not self._config.warm_start:
            self._mean, self._mean_is_q = self._random(step, self._matrix_shape[1]).to(self.dtype), True
        elif len(self._mean) != rank:
            factor = resized(self._mean.t().cpu().numpy(), rank, self.spare().t().cpu().numpy())
            self._mean = torch.from_numpy(factor).t().contiguous().to(self._mean.device)

    def begin(self, scale: float) -> None:
        super().begin(scale)
        self._added = self._kept.memory

    def half_step(self, basis: torch.Tensor) -> HalfStep:
        """What is to be multiplied next, by a basis of `mean`: delta Q^ or delta^T P^; the result is for `made`. In the
        first half-step the memory is added to delta on the way."""
        self._basis, memory, self._added = basis, self._added, None
        if self._scale_of_halves is not None:
            basis = basis * self._scale_of_halves
        return HalfStep(self._delta, basis, not self._mean_is_q, memory, self._scale / self._kept.scale)

    def made(self, own: torch.Tensor) -> None:
        """Takes this worker's factor, flat, as it is sent."""
        self._own, self._scale_of_own = own.view(self._rank, -1), self._scale_of_halves

    def receive(self, mean: torch.Tensor) -> None:
        self._mean = self._unscaled(mean.view(self._rank, -1), self._scale_of_halves)
        self._mean_is_q = not self._mean_is_q
        self._take_scale_of_halves(to_q=not self._mean_is_q)

    def take_own(self, own: torch.Tensor) -> None:
        """Takes this worker's part of the mean that has come, flat, where it is not as it was sent."""
        self._own = own.view(self._rank, -1)

    def _take_scale_of_halves(self, to_q: bool) -> None:
        """Of the next half-step, which makes Q or P."""
        self._scale_of_halves = None
        if self._sends_halves:
            longer = self._mean.shape[1] / self._matrix_shape[1 if to_q else 0]
            self._scale_of_halves = scale_of_halves(tensors, self._mean, longer)

    def _unscaled(self, sent: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """A factor that has travelled."""
        factor = sent if sent.dtype == self.dtype else sent.to(self.dtype)
        return factor if scale is None else factor / scale

    @property
    def rows(self) -> tuple[int, int]:
        """How many the factor has that is being averaged, and how long they are."""
        return self._rank, self._matrix_shape[0 if self._mean_is_q else 1]

    @property
    def mean_is_q(self) -> bool:
        """Which of the two `mean` is."""
        return self._mean_is_q

    @property
    def mean(self) -> torch.Tensor:
        """(r, n) or (r, m): the factor that was last averaged, in this step or before it."""
        return self._mean

    def fits(self, factor: float) -> torch.Tensor:
        if self.is_sparse:
            return super().fits(factor)
        p, q = self._p_and_q(self._mean)
        return all_finite((p.t() @ (q * factor)).half())

    def end(self, finite: bool, factor: float, undoable: bool, copies: Copies) -> None:
        """Ends the exchange of a sparse gradient, or of a step that is not finite."""
        if self.is_sparse:
            return super().end(finite, factor, undoable, copies)
        update = self.update(finite, factor, undoable)
        if all_finite(self._mean):
            with profiled("update"):
                products([update])
        else:
            update.out.fill_(torch.nan)
        self.put_update(update, finite, factor, copies)

    def update(
        self, finite: bool, factor: float, undoable: bool, keep: Callable[[Keep], Memory] = keep
    ) -> Product:
        """What the update is made of, and where it is to be written; takes note of what the next step needs.

        Args:
            keep: gives what is kept of a memory in 16 bits. It may do so later, but before the update is written.
        """
        out, self._undoable = self._delta, undoable
        if finite:
            memory = None
            if self._config.error_feedback:
                # Error feedback from this worker's own last factor.
                self._own = self._unscaled(self._own, self._scale_of_own)
                memory = Memory(self._delta, *self._p_and_q(self._own))
                if self._halves is None:
                    out = self._room()
                else:
                    memory = keep(self._in_halves(memory))
            self._next = Kept(self._mean, self._mean_is_q, memory, self._scale, self._own)
        return Product(*self._p_and_q(self._mean if factor == 1 else self._mean * factor), out)

    def _in_halves(self, memory: Memory) -> Keep:
        """The memory in 16 bits; delta can be written over then."""
        return Keep(memory, self._draws().in_step(*self._place), self._room())

    def _draws(self) -> Drawn:
        """For the rows and columns of delta."""
        if self._drawn is None or self._drawn.rows.device != self.parameter.device:
            self._drawn = Drawn.of(self._key, self._matrix_shape, self.parameter.device)
        return self._drawn

    def put_update(self, update: Product, finite: bool, factor: float, copies: Copies) -> None:
        """Puts the update, which is written now, into the gradient."""
        self._sample = None
        if finite:
            self.accordion.end(update.out, 1 / (factor * self._scale))
            if self._undoable and self._config.error_feedback:
                self._sample = Sample.of_product(update.p, update.q)
        self._hand_over(update.out, copies)
        self._basis = self._mean = self._own = None

    def _p_and_q(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last half-step's factors, of which the basis is one."""
        return (self._basis, last) if self._mean_is_q else (last, self._basis)

    def residual(self) -> float | None:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        kept = self._next or self._kept
        if kept.memory is None or kept.own is None:
            return None
        norms = (torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (kept.memory.tensor(), kept.own))
        return residual(*norms)

    def shared_state(self) -> dict[str, Any]:
        factor = {"factor": self.factor.cpu().clone(), "factor_is_q": self.factor_is_q}
        return {**factor, **self.accordion.state_dict()}

    def load_shared_state(self, state: Mapping) -> None:
        factor = state["factor"].to(self.factor, copy=True)
        self._kept = replace(self._kept, factor=factor, is_q=state["factor_is_q"])
        self.accordion.load_state_dict(state, self.factor)

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        super().load_state_dict(state, memories, weight)
        self._kept = replace(self._kept, own=None)
