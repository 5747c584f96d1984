"""Answers of the other workers that may still be on their way."""

from typing import Protocol

import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops

from horovod_powersgd.compressors.collectives import refusal_of_join
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.torch.profiling import profiled


class Future(Protocol):
    """What an exchange waits for."""

    def done(self) -> bool:
        """Whether result() returns at once."""

    def result(self) -> object:
        """Waits for it."""


class Mean:
    """An average that may still be on its way."""

    def __init__(self, tensor: torch.Tensor, handle=None):
        self._tensor, self._handle = tensor, handle

    def done(self) -> bool:
        """Whether result() returns at once."""
        return self._handle is None or mpi_ops.poll(self._handle)

    def result(self) -> torch.Tensor:
        """Waits for the average.

        Raises:
            HorovodInternalError: a worker was lost.
        """
        if self._handle is not None:
            with profiled("wait"):
                self._tensor, self._handle = mpi_ops.synchronize(self._handle), None
        return self._tensor


class Gathered:
    """All workers' bytes, that may still be on their way."""

    def __init__(self, packed: torch.Tensor, count: int, compressor: Compressor, handle=None):
        self._packed, self._count, self._compressor, self._handle = packed, count, compressor, handle

    def done(self) -> bool:
        """Whether result() returns at once."""
        return self._handle is None or mpi_ops.poll(self._handle)

    def result(self) -> torch.Tensor:
        """Waits for them: (W, bytes).

        Raises:
            HorovodInternalError: a worker was lost.
            RuntimeError: a worker has joined (hvd.join).
        """
        if self._handle is not None:
            with profiled("wait"):
                self._packed, self._handle = _gathered(self._handle, self._compressor), None
        return self._packed.view(self._count, -1)


class SparseMean:
    """An average of sparse tensors that may still be on its way.

    Attributes:
        nbytes: of all workers' parts, when they are here.
    """

    def __init__(self, handles: list[int], shape: torch.Size, count: int, parity: bool):
        self._handles, self._shape, self._count, self._parity = handles, shape, count, parity

    def done(self) -> bool:
        """Whether result() returns at once."""
        return all(mpi_ops.poll(handle) for handle in self._handles)

    def result(self) -> torch.Tensor:
        """Waits for the average, a coalesced sparse tensor.

        Raises:
            HorovodInternalError: a worker was lost.
            RuntimeError: a worker has joined (hvd.join).
        """
        indices, values = (_gathered(handle) for handle in self._handles)
        self.nbytes = indices.nbytes + values.nbytes
        if self._parity:
            indices, values = indices.squeeze(-1), values.squeeze(-1)
        return torch.sparse_coo_tensor(
            indices.t(), values / self._count, self._shape, check_invariants=False
        ).coalesce()


def _gathered(handle: int, compressor: Compressor | None = None) -> torch.Tensor:
    try:
        found = mpi_ops.synchronize(handle)
        return found[0] if isinstance(found, tuple) else found  # an alltoall also says how much has come
    except HorovodInternalError as error:
        # Horovod says so, in words that are not for users of a compressor.
        if "Join" in str(error):
            raise RuntimeError(refusal_of_join(compressor)) from None
        raise
