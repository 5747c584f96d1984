"""What one parameter's gradient goes through in a step, and what is kept of it for the next one."""

import math
from typing import Dict, Optional

import torch

from horovod_powersgd import PowerSGD
from horovod_powersgd.layout import Layout
from horovod_powersgd.reference import initial_factor
from horovod_powersgd.torch.orthogonalization import orthogonalize


class PlainGradient:
    """A gradient that is averaged as it is.

    A step calls begin, send, receive and end, in this order. An exchange can wait for it: it is done when backward
    has computed it.
    """

    def __init__(self, name: str, parameter: torch.nn.Parameter, layout: Layout):
        self.name, self.parameter, self.layout = name, parameter, layout
        self.arrived = False

    @property
    def sent_dtype(self) -> torch.dtype:
        """Of what Horovod is given; it does not reduce bfloat16."""
        return torch.float32 if self.parameter.dtype == torch.bfloat16 else self.parameter.dtype

    def done(self) -> bool:
        """Whether backward has computed the gradient."""
        return self.arrived

    def result(self) -> torch.Tensor:
        """The gradient."""
        return self.parameter.grad

    def begin(self, step: int) -> None:
        """Starts a step, after `step` others that were exchanged."""

    def send(self) -> torch.Tensor:
        """What the next round averages, flat: here the gradient, where possible in its own storage."""
        return self.parameter.grad.to(self.sent_dtype).reshape(-1)

    def receive(self, mean: torch.Tensor) -> None:
        """Takes the average of what was sent."""
        self._mean = mean

    def end(self, finite: bool, factor: float) -> None:
        """Ends a step: puts the average, times `factor`, into the gradient."""
        gradient = self.parameter.grad
        if self._mean.data_ptr() != gradient.data_ptr():
            gradient.copy_(self._mean.view(gradient.shape))
        if factor != 1:
            gradient.mul_(factor)
        self._mean = None

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step: nothing is left out."""
        return 0.0


class MatrixGradient(PlainGradient):
    """A gradient that travels as factors, with its error-feedback memory and its last factor.

    An n x m matrix; factors are kept transposed, P as (r, n) and Q as (r, m), which lets every product with the
    gradient run near the speed of memory. The dtype of all of them is float64 for float64 parameters, else float32.

    Attributes:
        memory: (n, m); None before the first step and without error feedback.
        factor: (r, m) or (r, n): the last averaged factor.
        factor_is_q: which of the two it is.
    """

    def __init__(self, name: str, parameter: torch.nn.Parameter, layout: Layout, config: PowerSGD):
        super().__init__(name, parameter, layout)
        self._config = config
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.memory: Optional[torch.Tensor] = None
        self.factor, self.factor_is_q = self._random_q(step=0).to(self.dtype), True
        self._spares: Dict[bool, torch.Tensor] = {}

    @property
    def sent_dtype(self) -> torch.dtype:
        return torch.float16 if self._config.wire_dtype == "float16" else self.dtype

    def _random_q(self, step: int) -> torch.Tensor:
        return self._random(self.layout.matrix_shape[1], step)

    def _random(self, columns: int, step: int = 0) -> torch.Tensor:
        """(r, columns) float64."""
        factor = initial_factor(self.name, columns, self.layout.rank, self._config.seed, step)
        return torch.from_numpy(factor.T.copy()).to(self.parameter.device)

    def _spare(self) -> torch.Tensor:
        if self._mean_is_q not in self._spares:
            self._spares[self._mean_is_q] = self._random(self._mean.shape[1])
        return self._spares[self._mean_is_q]

    def begin(self, step: int) -> None:
        """delta = gradient + memory, in the gradient's own storage where that can become the memory."""
        gradient = self.parameter.grad
        self._in_place = (
            gradient.dtype == self.dtype
            and gradient.is_contiguous()
            and gradient.untyped_storage().nbytes() == gradient.nbytes
        )
        if not self._in_place:
            gradient = gradient.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._delta = gradient.view(self.layout.matrix_shape)
        if self.memory is not None:
            self._delta.add_(self.memory)
        self._mean, self._mean_is_q = self.factor, self.factor_is_q
        if not self._config.warm_start:
            self._mean, self._mean_is_q = self._random_q(step).to(self.dtype), True

    def send(self) -> torch.Tensor:
        """A half-step: delta Q^ or delta^T P^."""
        self._basis = orthogonalize(self._mean, self._spare)
        side = self._delta.t() if self._mean_is_q else self._delta
        self._own = (self._basis @ side).to(self.sent_dtype)
        return self._own.view(-1)

    def receive(self, mean: torch.Tensor) -> None:
        self._mean = mean.view(self.layout.rank, -1).to(self.dtype)
        self._mean_is_q = not self._mean_is_q

    def memorize(self) -> None:
        """delta_w - P^ Q_w^T: error feedback from this worker's own last factor, while that still travels.

        The memory of the last step is not touched: this one can still fail.
        """
        if self._config.error_feedback:
            own = self._own.to(self.dtype)
            p, q = (own, self._basis) if self._mean_is_q else (self._basis, own)
            self._delta.addmm_(p.t(), q, alpha=-1)

    def end(self, finite: bool, factor: float) -> None:
        """Puts the update P^ Q^T, times `factor`, into the gradient; a finite step's memory and factor are kept."""
        update = self._delta
        p, q = (self._basis, self._mean) if self._mean_is_q else (self._mean, self._basis)
        if finite:
            self.factor, self.factor_is_q = self._mean, self._mean_is_q
            if self._config.error_feedback:
                update = torch.empty_like(self._delta) if self.memory is None else self.memory
                self.memory = self._delta
        if finite or torch.isfinite(self._mean).all():
            torch.mm(p.t(), q if factor == 1 else q * factor, out=update)
        else:
            update.fill_(torch.nan)
        gradient = self.parameter.grad
        if self._in_place:
            gradient.set_(update.view(gradient.shape))
        else:
            gradient.copy_(update.view(gradient.shape))
        self._delta = self._basis = self._mean = None

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        if self.memory is None:
            return None
        # The memory is orthogonal to what was sent: together they are delta.
        left, sent = self.memory.norm().item(), self._own.to(self.dtype).norm().item()
        return left / math.hypot(left, sent) if left else 0.0
