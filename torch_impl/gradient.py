"""What one parameter's gradient goes through in a step: one that is averaged as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from horovod_powersgd.layout import Layout
from horovod_powersgd.torch.clipping import Sample
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.ownership import overlapping, owns_storage
from horovod_powersgd.torch.workers import Workers

# (to, from) of tensors to be copied.
Copies = list[tuple[torch.Tensor, torch.Tensor]]


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
    # Tensors of a step, which lets go of them in the end: what is sent, and the average.
    _dense: Any
    _mean: Any

    def __init__(self, name: str, parameter: torch.nn.Parameter, layout: Layout, sparse_as_dense: bool = False):
        self.name, self.parameter, self.layout = name, parameter, layout
        self.arrived = self.is_sparse = self.overlaps = False
        self.incoming: torch.Tensor | None = None
        self.sparse_dim = 0
        self._sparse_as_dense = sparse_as_dense

    @property
    def sent_dtype(self) -> torch.dtype:
        """Of what Horovod is given."""
        return self._plain_dtype

    @property
    def _plain_dtype(self) -> torch.dtype:
        """Of what Horovod is given of a gradient as it is; it does not reduce bfloat16."""
        return torch.float32 if self.parameter.dtype == torch.bfloat16 else self.parameter.dtype

    @property
    def nbytes(self) -> int:
        """Of a dense gradient."""
        return self.parameter.numel() * self.parameter.element_size()

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """What the gradients of a bucket have in common."""
        return self.sent_dtype, self.parameter.device

    def done(self) -> bool:
        """Whether backward has computed the gradient."""
        return self.arrived

    def result(self) -> torch.Tensor | None:
        """The gradient."""
        return self.parameter.grad

    def make_zero(self) -> None:
        """Makes a gradient of zeros where backward computed none: another worker may have computed one."""
        if self.parameter.grad is not None:
            return
        zeros = torch.zeros_like(self.parameter)
        self.parameter.grad = zeros.to_sparse(self.sparse_dim) if self.sparse_dim else zeros

    def begin(self, scale: float) -> None:
        """Takes the gradient, which is here; `scale` is what the loss, and so the gradient, is multiplied by."""
        self.make_zero()  # where a hook of the user's has taken it away since it came
        gradient = self.parameter.grad
        assert gradient is not None
        self.is_sparse = gradient.is_sparse and not self._sparse_as_dense
        self.sparse_dim = gradient.sparse_dim() if self.is_sparse else 0
        self.overlaps = False
        self._shared = not gradient.is_sparse and not owns_storage(gradient, self.incoming)
        # What is done to it here does not count as a change of it.
        if not self.is_sparse:
            self._dense = gradient.to_dense() if gradient.is_sparse else gradient.data

    @property
    def borrowed(self) -> torch.Tensor | None:
        """The gradient, where its memory may be others', too."""
        return self.parameter.grad if self._shared else None

    def send_sparse(self, workers: Workers, parity: bool) -> tuple[SparseMean, int]:
        """Starts averaging a sparse gradient by gathering, as Horovod does; also gives the bytes handed to it."""
        assert self.parameter.grad is not None
        gradient = self.parameter.grad.coalesce()
        indices, values = gradient.indices(), gradient.values().to(self._plain_dtype)
        self._sparse_bytes = indices.nbytes + values.nbytes
        return workers.sparse_mean(indices, values, gradient.shape, self.name, parity), self._sparse_bytes

    def receive_sparse(self, average: torch.Tensor) -> None:
        """Takes the average of a sparse gradient."""
        self._mean = average.to(self.parameter.dtype)

    def fits(self, factor: float) -> torch.Tensor:
        """Whether the average, times `factor`, is finite in half precision; a boolean on the device."""
        update = self._mean if self._mean.layout == torch.strided else self._mean.values()
        return all_finite(update * factor)

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

    def end(self, finite: bool, factor: float, undoable: bool, copies: Copies) -> None:
        """Ends an exchange: puts the average, times `factor`, into the gradient.

        Args:
            finite: whether all averages are, on all workers. Otherwise the step is to leave no trace.
            factor: W for the sum of all workers' gradients, else 1.
            undoable: whether the step may still be discarded. Otherwise commit follows.
            copies: gets (to, from) of what the caller is to copy then.
        """
        gradient = self.parameter.grad
        assert gradient is not None
        if not gradient.is_sparse and self._mean.data_ptr() == gradient.data_ptr():
            if factor != 1:
                gradient.mul_(factor)
        else:
            self.put(self._mean if factor == 1 else self._mean * factor, copies)
        self._mean = self._dense = None

    def put(self, update: torch.Tensor, copies: Copies) -> None:
        """Puts an update into the gradient; `copies` as in end."""
        gradient = self.parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            if not update.is_sparse:
                update = update.to(gradient.dtype).to_sparse(gradient.sparse_dim())
            gradient.zero_().add_(update)
        elif gradient.requires_grad:  # it is part of a graph, which may still need it
            self.parameter.grad = torch.empty_like(gradient, requires_grad=False).copy_(update)
        elif self.overlaps:
            copy = torch.empty_like(gradient).copy_(update)
            gradient.set_(copy)  # type: ignore[call-overload]  # PyTorch names storages only
        else:
            copies.append((gradient, update))

    def sample(self) -> tuple[Sample, torch.Tensor] | None:
        """What tells by how much a changed update was clipped, and the update as it is now; None where it does not
        matter."""
        return None

    def commit(self, clipped: float | None = None) -> None:
        """Keeps what the next step needs: the step is taken.

        Args:
            clipped: what the update has been multiplied by since end, 1 where it has not; None where that step could
                not be discarded, and nobody could clip.
        """

    def discard(self) -> None:
        """Leaves everything as it was before the step, which is not taken."""

    def scaled_by(self, scale: float) -> None:
        """Takes note, between end and commit, of what the loss was multiplied by, where it was not known before."""

    def residual(self) -> float | None:
        """|e| / |delta| of the last step: nothing is left out."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """What is kept for the next step; on the CPU."""
        return {"shape": list(self.layout.shape)}

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        """Takes what another gradient of this shape kept.

        Args:
            state: from state_dict.
            memories: those of the workers that this one stands for, with a memory, and
            weight: what their sum is multiplied by.
        """

    def take_over(self, other: "PlainGradient") -> None:
        """Takes what another gradient of the same parameter and configuration has kept, and comes in its place."""


def put_all(updates: Sequence[tuple[PlainGradient, torch.Tensor]]) -> None:
    """Puts updates into gradients that may have memory in common."""
    dense: list[tuple[PlainGradient, torch.Tensor]] = []
    for gradient, _ in updates:
        assert gradient.parameter.grad is not None
        if not gradient.parameter.grad.is_sparse:
            dense.append((gradient, gradient.parameter.grad))
    mark_overlaps(dense)
    copies: Copies = []
    for gradient, update in updates:
        gradient.put(update, copies)
    copy_all(copies)


def mark_overlaps(dense: Sequence[tuple[PlainGradient, torch.Tensor]]) -> None:
    """Notes of dense gradients, each with its tensor, which have memory in common with others of them."""
    for (gradient, _), overlaps_others in zip(dense, overlapping([grad for _, grad in dense]), strict=True):
        gradient.overlaps = overlaps_others


def copy_all(copies: Copies) -> None:
    """All at once, which takes a GPU few kernels."""
    if copies:
        torch._foreach_copy_([to for to, _ in copies], [source for _, source in copies])
