"""What workers tell each other beside gradients, and wait for: to agree, and to take over another one's state."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from horovod.torch import mpi_ops
from horovod.torch.mpi_ops import Max, Sum, allgather, allreduce, allreduce_async, synchronize

from horovod_powersgd.torch.workers import Workers

Item = TypeVar("Item")


def largest(workers: Workers, numbers: list[int], name: str) -> list[int]:
    """The largest of all workers', number by number. A worker that has joined (hvd.join) counts as zeros."""
    return begin_largest(workers, numbers, name)()


def begin_largest(workers: Workers, numbers: list[int], name: str) -> Callable[[], list[int]]:
    """Begins to find them; gives what waits for them."""
    sent = torch.tensor(numbers, dtype=torch.int64)
    handle = allreduce_async(sent, name=f"{workers.prefix}.{name}", op=Max, process_set=workers.process_set)
    return lambda: synchronize(handle).tolist()


def items(workers: Workers, item: Item, name: str) -> list[Item]:
    """Each worker's item, in their order; Horovod's allgather_object knows no process sets."""
    pickled = torch.from_numpy(np.frombuffer(pickle.dumps(item), np.uint8).copy())
    name = f"{workers.prefix}.{name}"
    sizes = allgather(torch.tensor([len(pickled)]), name=f"{name}.sizes", process_set=workers.process_set)
    items = allgather(pickled, name=name, process_set=workers.process_set)
    return [pickle.loads(part.numpy().tobytes()) for part in items.split(sizes.tolist())]


def from_worker(workers: Workers, root: int, item: Item) -> Item:
    """The root's item; the root is given by its global rank. By allreduce, which a worker may have joined."""
    mine = pickle.dumps(item) if mpi_ops.rank() == root else b""
    mine += bytes(-len(mine) % 4)
    [length] = largest(workers, [len(mine)], "state.length")
    sent = torch.from_numpy(np.frombuffer(mine + bytes(length - len(mine)), np.int32).copy())
    packed = allreduce(sent, name=f"{workers.prefix}.state", op=Sum, process_set=workers.process_set)
    return pickle.loads(packed.numpy().tobytes())
