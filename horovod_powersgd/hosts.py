"""Which workers share a host: what an exchange of two levels needs to know.

In one of two levels (PowerSGD.hierarchical) the workers of a host first average their gradients among themselves, and
then stand for one worker: each multiplies, and remembers, a share of the rows of every matrix. Where DALL-E was trained
so, that was for the memory (Ramesh et al., arXiv 2102.12092, appendix).
"""

import os
import socket
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple


class RowShare(NamedTuple):
    """A worker's part of the rows of every matrix. Integers, or in TensorFlow's graphs int64 tensors.

    Attributes:
        place: which part, from 0.
        parts: into how many the rows are divided: so many workers share a host.
    """

    place: Any
    parts: Any

    def rows(self, n: int, place: Any = None) -> tuple[Any, Any]:
        """The first of a matrix's n rows that are of this part, or of another place's, and how many they are."""
        place = self.place if place is None else place
        first, end = n * place // self.parts, n * (place + 1) // self.parts
        return first, end - first


class Host(NamedTuple):
    """A worker's host, among the others.

    Attributes:
        hosts: each one's workers, by their numbers, in ascending order; the hosts in the order of their first ones. All
            have as many.
        number: which of them this worker's is, from 0.
        share: this worker's.
    """

    hosts: Any
    number: Any
    share: RowShare

    @property
    def peers(self) -> Any:
        """The workers that share this one's."""
        return self.hosts[self.number]


def host_key() -> int:
    """A number for this host's name, above 0. HOROVOD_HOSTNAME, which Horovod's Gloo launcher sets, comes first."""
    return zlib.crc32((os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()).encode()) // 2 + 1


def host_of(keys: Sequence[int], worker: int) -> Host | str:
    """This worker's host, or why the exchange does not have two levels.

    Args:
        keys: each worker's host_key(); 0 of one that has joined (hvd.join).
        worker: this one's number.
    """
    if 0 in keys:
        return "a worker has joined"
    peers: dict[int, list[int]] = {}
    for number, key in enumerate(keys):
        peers.setdefault(key, []).append(number)
    counts = [len(some) for some in peers.values()]
    if len(counts) == 1:
        return "all workers are on one host"
    if max(counts) == 1:
        return "no two workers share a host"
    if len(set(counts)) > 1:
        return f"the hosts have different numbers of workers: {', '.join(map(str, counts))}"
    mine = peers[keys[worker]]
    number, share = [*peers].index(keys[worker]), RowShare(mine.index(worker), len(mine))
    return Host(tuple(map(tuple, peers.values())), number, share)
