"""The workers that exchange gradients, by Horovod's asynchronous collectives."""

import pickle
from dataclasses import dataclass
from typing import List, Optional

import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from horovod.torch.mpi_ops import (
    Max,
    ProcessSet,
    Sum,
    allgather,
    allgather_async,
    allreduce,
    allreduce_async,
    allreduce_async_,
)

from horovod_powersgd.compressors.compressor import Compressor, refusal_of_join
from horovod_powersgd.torch.phase import phase

# Known by its identity.
_world = [None]


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

    @staticmethod
    def world() -> object:
        """Another object after each hvd.init(), which an elastic job calls when its workers change, and hvd.join()."""
        global _world
        if _world[0] is not mpi_ops._handle_map:  # init makes a new one
            _world = [mpi_ops._handle_map]
        return _world

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

    def sparse_mean(
        self, indices: torch.Tensor, values: torch.Tensor, shape: torch.Size, name: str, turn: bool
    ) -> "SparseMean":
        """Starts averaging a sparse tensor, as Horovod does: all workers' parts are gathered."""
        parts = (indices.t().contiguous(), "indices"), (values.contiguous(), "values")
        handles = [self._start_gather(part, f"{name}.{what}", turn) for part, what in parts]
        return SparseMean(handles, shape, self.count, turn)

    def gather(self, packed: torch.Tensor, name: str, turn: bool, compressor: Compressor) -> "Gathered":
        """Starts gathering as many bytes from each worker, for a compressor."""
        if self.count == 1:
            return Gathered(packed, 1, compressor)
        return Gathered(packed, self.count, compressor, self._start_gather(packed, name, turn))

    def _start_gather(self, tensor: torch.Tensor, name: str, turn: bool) -> int:
        """Horovod hangs where a worker has joined and the others gather what has the shape that it remembers for that
        name; otherwise it answers with an error. So every other time the tensor has an axis more."""
        tensor = tensor.unsqueeze(-1) if turn else tensor
        return allgather_async(tensor, f"{self.prefix}.{name}", self.process_set)

    def largest(self, numbers: List[int], name: str) -> List[int]:
        """The largest of all workers', number by number. A worker that has joined (hvd.join) counts as zeros."""
        sent = torch.tensor(numbers, dtype=torch.int64)
        return allreduce(sent, name=f"{self.prefix}.{name}", op=Max, process_set=self.process_set).tolist()

    def items(self, item: object, name: str) -> List[object]:
        """Each worker's item, in their order; Horovod's allgather_object knows no process sets."""
        pickled = torch.from_numpy(np.frombuffer(pickle.dumps(item), np.uint8).copy())
        name = f"{self.prefix}.{name}"
        sizes = allgather(torch.tensor([len(pickled)]), name=f"{name}.sizes", process_set=self.process_set)
        items = allgather(pickled, name=name, process_set=self.process_set)
        return [pickle.loads(part.numpy().tobytes()) for part in items.split(sizes.tolist())]

    def from_worker(self, root: int, item: object) -> object:
        """The root's item; the root is given by its global rank. By allreduce, which a worker may have joined."""
        mine = pickle.dumps(item) if mpi_ops.rank() == root else b""
        mine += bytes(-len(mine) % 4)
        [length] = self.largest([len(mine)], "state.length")
        sent = torch.from_numpy(np.frombuffer(mine + bytes(length - len(mine)), np.int32).copy())
        packed = allreduce(sent, name=f"{self.prefix}.state", op=Sum, process_set=self.process_set)
        return pickle.loads(packed.numpy().tobytes())


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
            with phase("wait"):
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
            with phase("wait"):
                self._packed, self._handle = _gathered(self._handle, self._compressor), None
        return self._packed.view(self._count, -1)


class SparseMean:
    """An average of sparse tensors that may still be on its way.

    Attributes:
        nbytes: of all workers' parts, when they are here.
    """

    def __init__(self, handles: List[int], shape: torch.Size, count: int, turn: bool):
        self._handles, self._shape, self._count, self._turn = handles, shape, count, turn

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
        if self._turn:
            indices, values = indices.squeeze(-1), values.squeeze(-1)
        return torch.sparse_coo_tensor(
            indices.t(), values / self._count, self._shape, check_invariants=False
        ).coalesce()


def _gathered(handle: int, compressor: Optional[Compressor] = None) -> torch.Tensor:
    try:
        return mpi_ops.synchronize(handle)
    except HorovodInternalError as error:
        # Horovod says so, in words that are not for users of a compressor.
        if "Join" in str(error):
            raise RuntimeError(refusal_of_join(compressor)) from None
        raise


def join(device: int = -1) -> int:
    """horovod.torch.join; the workers' next exchange starts from what the one that went farthest knows."""
    global _world
    last = mpi_ops.join(device)
    _world = [mpi_ops._handle_map]
    return last
