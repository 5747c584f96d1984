"""The workers of a host, who read each other's gradients where they are."""

from collections.abc import Sequence

import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_powersgd import neighbours
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.control_messages import largest
from horovod_powersgd.torch.workers import Workers

# Numbers that are added up at once: so few that they stay in a core's cache.
CHUNK = 2**16


class Peers:
    """The workers that share this one's host, itself among them, and can read each other's memory.

    Args:
        processes: theirs, in the workers' order.
        place: this worker's among them.
    """

    def __init__(self, processes: Sequence[int], place: int):
        self._processes, self._place = processes, place

    def average(self, own: torch.Tensor, addresses: Sequence[int]) -> None:
        """Lets a flat tensor of this worker's be the mean of itself and of as many numbers of every other's memory.

        Args:
            own: on a processor, contiguous.
            addresses: where each has its numbers, in the workers' order.

        Raises:
            HorovodInternalError: a worker is gone, or has let go of its gradient, since its exchange has failed.
        """
        others = [other for place, other in enumerate(zip(self._processes, addresses)) if place != self._place]
        read = torch.empty_like(own[:CHUNK])
        for start in range(0, own.numel(), CHUNK):
            total = own[start : start + CHUNK]
            for process, address in others:
                part = read[: total.numel()]
                self._read(process, address + start * own.itemsize, part)
                total += part
            total /= len(self._processes)

    @staticmethod
    def _read(process: int, address: int, to: torch.Tensor) -> None:
        try:
            neighbours.read(process, address, to.nbytes, to.data_ptr())
        except OSError as error:
            raise HorovodInternalError(f"a worker of this host cannot be read any more: {error}") from error


def peers_of(workers: Workers, host: Host | None, on_processor: bool) -> Peers | None:
    """This worker's peers; None where the host is None, or where not all workers of all hosts can read their peers'
    gradients. Every worker must ask, and all get an answer of the same kind.

    Args:
        on_processor: whether this worker's gradients are.
    """
    offers = [0] * neighbours.NUMBERS * workers.count
    mine = slice(neighbours.NUMBERS * workers.index, neighbours.NUMBERS * (workers.index + 1))
    offers[mine] = neighbours.offer()
    told = torch.tensor(largest(workers, offers, "offers")).view(-1, neighbours.NUMBERS)
    offered = [] if host is None else told[list(host.peers)].tolist()
    reads = on_processor and bool(offered) and all(map(neighbours.is_readable, offered))
    [somebody_cannot] = largest(workers, [not reads], "unreadable")
    if host is None or somebody_cannot:
        return None
    return Peers([process for process, *_ in offered], host.share.place)
