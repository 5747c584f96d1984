"""The workers of a host, who read each other's tensors where they are."""

from collections.abc import Sequence

import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_powersgd import neighbours
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.control_messages import items, largest
from horovod_powersgd.torch.workers import Workers

# Numbers that are added up at once: so few that they stay in a core's cache.
CHUNK = 2**16


class Peers:
    """The workers that share this one's host, itself among them. Each has a board that the others can read, which shows
    where its tensors are.

    Args:
        board: this worker's.
        boards: (process, address) of all of theirs, in the workers' order.
        place: this worker's among them.
        names: of what is shown there, the same on all workers.
    """

    def __init__(self, board: torch.Tensor, boards: Sequence[tuple[int, int]], place: int, names: Sequence[str]):
        self._board, self._places = board, {name: number for number, name in enumerate(names)}
        self._others = [other for number, other in enumerate(boards) if number != place]

    def show(self, name: str, tensor: torch.Tensor) -> None:
        """Shows a contiguous tensor. It must stay where it is until all others have read it.

        Raises:
            RuntimeError: it is not in the processor's memory.
        """
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"{name} has moved to {tensor.device} since the first exchange, and the other workers of this host "
                "cannot read it there: move the model before, or wrap the optimizer anew afterwards"
            )
        self._board[self._places[name]] = tensor.data_ptr()

    def shown(self) -> list[tuple[int, list[int]]]:
        """Of each other worker the process, and the addresses that it shows, in the order of the names."""
        found = []
        for process, address in self._others:
            board = torch.empty_like(self._board)
            _read(process, address, board)
            found.append((process, board.tolist()))
        return found

    def add_others(self, name: str, shown: Sequence[tuple[int, list[int]]], own: torch.Tensor, first: int = 0) -> None:
        """Adds what the others have to this worker's.

        Args:
            shown: as shown() gives it.
            own: flat and contiguous.
            first: of the others' numbers, the first that counts.

        Raises:
            HorovodInternalError: a worker is gone, or has let go of its tensor, since its exchange has failed.
        """
        place, room = self._places[name], torch.empty_like(own[:CHUNK])
        for start in range(0, own.numel(), CHUNK):
            total = own[start : start + CHUNK]
            part = room[: total.numel()]
            for process, addresses in shown:
                _read(process, addresses[place] + (first + start) * own.itemsize, part)
                total += part


def _read(process: int, address: int, to: torch.Tensor) -> None:
    try:
        neighbours.read(process, address, to.nbytes, to.data_ptr())
    except OSError as error:
        raise HorovodInternalError(f"a worker of this host cannot be read any more: {error}") from error


def peers_of(workers: Workers, host: Host | None, names: Sequence[str], on_processor: bool) -> Peers | None:
    """This worker's peers; None where the host is None, on all workers, or where not all of them can read their peers.
    Every worker must ask, and all get an answer of the same kind.

    Args:
        names: of what they will show each other.
        on_processor: whether this worker's gradients are.
    """
    if host is None:
        return None
    board = torch.zeros(len(names), dtype=torch.int64)
    everyones = items(workers, (neighbours.offer(), board.data_ptr()) if on_processor else None, "offers")
    found = [everyones[peer] for peer in host.peers]
    reads = on_processor and all(told is not None and neighbours.is_readable(told[0]) for told in found)
    [somebody_cannot] = largest(workers, [not reads], "unreadable")
    if somebody_cannot:
        return None
    return Peers(board, [(process, address) for (process, *_), address in found], host.share.place, names)
