"""A gradient that travels as PowerSGD's factors from host to host, and whole inside a host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from horovod_powersgd.hosts import RowShare
from horovod_powersgd.statistics import residual
from horovod_powersgd.torch.compressed_gradient import of_all_rows
from horovod_powersgd.torch.half_memory import Drawn, Keep, keep
from horovod_powersgd.torch.kernels import HalfStep, Memory, Product
from horovod_powersgd.torch.powersgd_gradient import Kept, PowerSGDGradient


class TwoLevelGradient(PowerSGDGradient):
    """A PowerSGDGradient in an exchange that may have two levels (horovod_powersgd.hosts).

    In one of two levels delta and the memory are this worker's share of the rows, of the mean of its host's workers. A
    step calls start, begin, send_to for each of the host's workers, take, then as for a PowerSGDGradient; and take_own
    where the last half-step has made Q. In an exchange of one level it is a PowerSGDGradient.

    A memory that is from another division of the rows goes into the gradient of the first step after.

    Attributes:
        share: this worker's; None where the exchange has one level.
    """

    share: RowShare | None = None
    _whole: Any = None  # the gradient as a matrix, in a step with two levels; the update is written there
    _is_in_gradient = False  # whether delta is a part of that

    def _rows(self, place: int | None = None) -> tuple[int, int]:
        assert self.share is not None
        return self.share.rows(self._matrix_shape[0], place)

    def begin(self, scale: float) -> None:
        """Takes the gradient; with two levels it is not delta yet, but what the host's workers send each other."""
        super().begin(scale)
        if self.is_sparse:
            return
        if self._added is not None and self._kept.share != self.share:
            share, n = self._kept.share, self._matrix_shape[0]
            added = of_all_rows(self._added.tensor(), share and (*share, n))
            self._delta.add_(added, alpha=scale / self._kept.scale)
            self._added = None
        if self.share is not None:
            self._whole = self._delta

    def send_to(self, place: int) -> torch.Tensor:
        """The rows that another worker of the host works on, flat."""
        return self._whole.narrow(0, *self._rows(place)).reshape(-1)

    @property
    def whole(self) -> torch.Tensor:
        """(n, m), contiguous: what send_to gives rows of."""
        return self._whole

    def offset_of(self, place: int) -> int:
        """How many numbers come before those."""
        return self._rows(place)[0] * self._matrix_shape[1]

    def size_of(self, place: int) -> int:
        """How many numbers a worker of the host works on."""
        return self._rows(place)[1] * self._matrix_shape[1]

    @property
    def own(self) -> torch.Tensor:
        """(r, rows) or (r, m): what this worker's rows have made of the factor."""
        return self._own

    def take_own(self, own: torch.Tensor) -> None:
        """With two levels: the host's part, of which P's other rows are not needed."""
        super().take_own(own)
        if self.share is not None and not self._mean_is_q:
            self._own = _columns(self._own, *self._rows())

    @property
    def factor_size(self) -> int:
        """How many numbers the factor has that was averaged last."""
        return self._mean.numel()

    def take(self, mean: torch.Tensor, in_gradient: bool) -> None:
        """Takes this worker's rows of the mean of its host's workers, flat: delta, but for the memory.

        Args:
            in_gradient: whether they stand in the gradient, in place of its own.
        """
        self._delta, self._is_in_gradient = mean.view(-1, self._matrix_shape[1]), in_gradient

    def half_step(self, basis: torch.Tensor) -> HalfStep:
        task = super().half_step(basis)
        if self.share is None or not task.makes_q:
            return task
        return task._replace(basis=_columns(task.basis, *self._rows()))

    def part(self) -> torch.Tensor:
        """This worker's part of the host's factor, flat."""
        if self.share is None or not self._mean_is_q:  # Q's parts are sums over the rows of each
            return self._own.view(-1)
        first, rows = self._rows()
        return torch.nn.functional.pad(self._own, (first, self._matrix_shape[0] - first - rows)).view(-1)

    def receive(self, mean: torch.Tensor) -> None:
        if self.share is not None and self._config.linear:
            # A host's factor is the sum of its workers' parts. Not before they travel: halves would be rounded twice.
            # In 8 bits it is the hosts that average.
            mean = mean.to(self.dtype).mul_(self.share.parts)
        super().receive(mean)

    def update(
        self, finite: bool, factor: float, undoable: bool, keep: Callable[[Keep], Memory] = keep
    ) -> Product:
        if self.share is None:
            return super().update(finite, factor, undoable, keep)
        self._undoable = undoable
        p, q = self._p_and_q(self._mean)
        if finite:
            memory = own = None
            if self._config.error_feedback:
                own_p, own_q = self._p_and_q(self._unscaled(self._own, self._scale_of_own))
                own = (_columns(own_p, *self._rows()) if self._mean_is_q else own_p), own_q
                if self._halves is not None:
                    memory = keep(self._in_halves(Memory(self._delta, *own)))
                elif self._is_in_gradient:
                    memory = Memory(self._room().copy_(self._delta), *own)
                else:
                    memory = Memory(self._delta, *own)
            self._next = Kept(self._mean, self._mean_is_q, memory, self._scale, own, self.share)
        out, self._whole = self._whole, None
        return Product(p, q if factor == 1 else q * factor, out)

    def _draws(self) -> Drawn:
        drawn = super()._draws()
        return drawn if self.share is None else Drawn(drawn.rows.narrow(0, *self._rows()), drawn.columns)

    def _room(self) -> torch.Tensor:
        room = super()._room() if self._kept.share == self.share else None
        # What was set aside may be of another division of the rows.
        return room if room is not None and room.shape == self._delta.shape else self._new_room()

    def _set_aside(self, memory: Memory | None) -> None:
        if self.share is None and memory is not None and memory.storage().shape == self._matrix_shape:
            super()._set_aside(memory)

    def _mixed(self, old: Kept, new: Kept, weight: float) -> Kept:
        # An old memory of another division of the rows is in the new one already.
        return super()._mixed(old, new, weight) if old.share == new.share else new

    def residual(self) -> float | None:
        kept = self._next or self._kept
        if kept.share is None or kept.memory is None or kept.own is None:
            return super().residual()
        p, q = (factor.double() for factor in kept.own)
        sent = ((p @ p.t()) * (q @ q.t())).sum().clamp(min=0).sqrt().item()
        return residual(torch.linalg.vector_norm(kept.memory.tensor(), dtype=torch.float64).item(), sent)

    def state_dict(self) -> dict[str, Any]:
        share = self._kept.share
        return super().state_dict() | ({} if share is None else {"memory_share": [*share, self._matrix_shape[0]]})

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        super().load_state_dict(state, memories, weight)
        self._kept = replace(self._kept, share=None)
        if weight == 1 and len(memories) == 1 and "memory_share" in memories[0]:
            # As it is: the exchange may go on with the same share.
            saved = memories[0]
            memory, share = saved["memory"].to(self.factor, copy=True), RowShare(*saved["memory_share"][:2])
            self._kept = replace(
                self._kept, memory=self._memory_of(memory), share=share, scale=saved["memory_scale"]
            )


def _columns(factor: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """What a factor, kept transposed, has for some rows of the matrix; contiguous."""
    return factor.narrow(1, first, count).clone(memory_format=torch.contiguous_format)
