"""The workers that exchange gradients, by Horovod's asynchronous collectives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from horovod.torch.mpi_ops import ProcessSet, Sum, allgather_async, allreduce_async, allreduce_async_, alltoall_async

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.torch.futures import Gathered, Mean, SparseMean


@dataclass
class Workers:
    """The workers that average together.

    Attributes:
        process_set: Horovod's.
        prefix: of all tensor names sent to Horovod, so that two optimizers can live in one process. The workers agree
            on it before the first exchange.
        predivide_factor: the part of the division by the number of workers that comes before the sum.
    """

    process_set: ProcessSet
    prefix: str = ""
    predivide_factor: float = 1.0

    @property
    def count(self) -> int:
        """W. It can change between two steps of an elastic job."""
        return self.process_set.size()

    @property
    def index(self) -> int:
        """This worker's number among them."""
        return self.process_set.rank()

    def mean(self, tensor: torch.Tensor, name: str, in_place: bool = False) -> Mean:
        """Starts averaging a contiguous tensor of a dtype that Horovod reduces."""
        if self.count == 1:
            return Mean(tensor)
        start = allreduce_async_ if in_place else allreduce_async
        return Mean(tensor, start(tensor, name=f"{self.prefix}.{name}", **self.averaging(tensor.dtype)))

    def averaging(self, dtype: torch.dtype) -> dict[str, Any]:
        """What makes Horovod's allreduce an average of tensors of a dtype."""
        count = self.count
        # Half precision overflows where the sum comes before the division.
        predivide_factor = count if dtype == torch.float16 else self.predivide_factor
        return {
            "op": Sum,
            "prescale_factor": 1.0 / predivide_factor,
            "postscale_factor": predivide_factor / count,
            "process_set": self.process_set,
        }

    def sparse_mean(
        self, indices: torch.Tensor, values: torch.Tensor, shape: torch.Size, name: str, parity: bool
    ) -> SparseMean:
        """Starts averaging a sparse tensor, as Horovod does: all workers' parts are gathered."""
        parts = (indices.t().contiguous(), "indices"), (values.contiguous(), "values")
        handles = [self._start_gather(part, f"{name}.{what}", parity) for part, what in parts]
        return SparseMean(handles, shape, self.count, parity)

    def gather(self, packed: torch.Tensor, name: str, parity: bool, compressor: Compressor) -> Gathered:
        """Starts gathering as many bytes from each worker, for a compressor."""
        if self.count == 1:
            return Gathered(packed, 1, compressor)
        return Gathered(packed, self.count, compressor, self._start_gather(packed, name, parity))

    def exchange(
        self,
        messages: torch.Tensor,
        name: str,
        parity: bool,
        compressor: Compressor,
        sizes: Mapping[int, int] | None = None,
    ) -> Gathered:
        """Starts sending each worker one of these messages (W, bytes), for a compressor; gives what all have sent to
        this one. With sizes, of a flat tensor or of messages, in this order: by the numbers of some workers, this one
        among them, how much each is sent, or how many; gives what those have sent to this one, as much each."""
        splits = None
        if sizes is not None:
            splits = torch.tensor([sizes.get(worker, 0) for worker in range(self.count)], dtype=torch.int32)
        messages = messages.unsqueeze(-1) if parity else messages  # as in _start_gather
        handle = alltoall_async(messages, splits, f"{self.prefix}.{name}", self.process_set)
        return Gathered(messages, self.count if sizes is None else len(sizes), compressor, handle)

    def tell(
        self, whom: Sequence[int], message: torch.Tensor, name: str, parity: bool, compressor: Compressor
    ) -> Gathered:
        """Starts sending each of some workers, this one among them, a flat tensor, for a compressor; gives what those
        have sent to this one, in ascending order."""
        return self.exchange(message.repeat(len(whom), 1), name, parity, compressor, dict.fromkeys(whom, 1))

    def _start_gather(self, tensor: torch.Tensor, name: str, parity: bool) -> int:
        """Horovod remembers the shape of an allgather by its name. Where a worker has joined, an allgather of the shape
        that it remembers hangs, and one of another shape raises an error: so the number of axes alternates."""
        tensor = tensor.unsqueeze(-1) if parity else tensor
        return allgather_async(tensor, f"{self.prefix}.{name}", self.process_set)
