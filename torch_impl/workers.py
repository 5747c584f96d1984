"""Averaging over the workers, by Horovod's asynchronous allreduce."""

from dataclasses import dataclass

import torch
from horovod.torch.mpi_ops import ProcessSet, Sum, allreduce_async, allreduce_async_, poll, synchronize


@dataclass(frozen=True)
class Workers:
    """The workers that average together.

    Attributes:
        process_set: Horovod's.
        prefix: of all tensor names sent to Horovod, so that two optimizers can live in one process.
        predivide_factor: the part of the division by the number of workers that comes before the sum.
    """

    process_set: ProcessSet
    prefix: str
    predivide_factor: float = 1.0

    @property
    def count(self) -> int:
        """W. It can change between two steps of an elastic job."""
        return self.process_set.size()

    def mean(self, tensor: torch.Tensor, name: str, in_place: bool = False) -> "Mean":
        """Starts averaging a contiguous tensor of a dtype that Horovod reduces."""
        if self.count == 1:
            return Mean(tensor)
        # Half precision overflows where the sum comes before the division.
        predivide_factor = self.count if tensor.dtype == torch.float16 else self.predivide_factor
        start = allreduce_async_ if in_place else allreduce_async
        handle = start(
            tensor,
            name=f"{self.prefix}.{name}",
            op=Sum,
            prescale_factor=1.0 / predivide_factor,
            postscale_factor=predivide_factor / self.count,
            process_set=self.process_set,
        )
        return Mean(tensor, handle)


class Mean:
    """An average that may still be on its way."""

    def __init__(self, tensor: torch.Tensor, handle=None):
        self._tensor, self._handle = tensor, handle

    def done(self) -> bool:
        """Whether result() returns at once."""
        return self._handle is None or poll(self._handle)

    def result(self) -> torch.Tensor:
        """Waits for the average.

        Raises:
            HorovodInternalError: a worker was lost.
        """
        if self._handle is not None:
            self._tensor, self._handle = synchronize(self._handle), None
        return self._tensor
