"""What messages between workers take, as measured, or as links would have it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Where it is not measured: bytes of the others of its host that each worker gets in a second and adds up, of an AMD
# Zen 4 server. Of gradients, which PyTorch reads where they are; and of Horovod's messages.
READ_IN_HOST, SENT_IN_HOST = 3e9, 1e9
# Seconds from one of Horovod's looks for messages to the next, unless HOROVOD_CYCLE_TIME is set.
CYCLE_TIME = 1e-3


@dataclass(frozen=True)
class Curve:
    """Seconds of a message by its bytes: straight lines between what was measured, and beyond it what the largest took
    for each byte.

    Attributes:
        points: (bytes, seconds), with different bytes. Where more bytes took less time, less would have taken no more:
            what disturbs a measurement makes it longer.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes, seconds = np.array(sorted(self.points), float).T
        seconds = np.minimum.accumulate(seconds[::-1])[::-1]
        object.__setattr__(self, "points", tuple(zip(sizes.tolist(), seconds.tolist(), strict=True)))

    @classmethod
    def of_line(cls, shortest: float, per_byte: float, least: float = CYCLE_TIME) -> "Curve":
        """Of messages that take `shortest` and so much longer for each byte, and `least` at least."""
        start = max(shortest, least)
        waited_for = (start - shortest) / per_byte if per_byte else 0.0  # bytes
        return cls(tuple({0.0: start, waited_for: start, waited_for + 1e9: start + 1e9 * per_byte}.items()))

    def __call__(self, nbytes: float) -> float:
        (sizes, seconds), first, last = zip(*self.points, strict=True), self.points[0], self.points[-1]
        if nbytes <= last[0] or len(self.points) == 1:
            return float(np.interp(nbytes, sizes, seconds))
        return last[1] + (nbytes - last[0]) * (last[1] - first[1]) / (last[0] - first[0])


class HostNetwork(NamedTuple):
    """What two levels (horovod_powersgd.hosts) take where all workers are at it at once. Messages are alltoalls, by the
    bytes that each worker hands over, its own part among them.

    Attributes:
        per_host: L, how many workers share each host.
        gradients: seconds until each worker of a host has its share of their mean, by the bytes of a worker's.
        inside: of a message among the workers of a host, and of adding up what has come.
        between: the same among one worker of each host.
    """

    per_host: int
    gradients: Curve
    inside: Curve
    between: Curve


class Network(NamedTuple):
    """What messages between the workers take.

    Attributes:
        workers: W.
        allreduce: seconds by the bytes that each worker hands over, in single precision.
        halves: the same in half precision.
        allgather: seconds by the bytes that each worker hands over to all.
        alltoall: seconds by the bytes that each worker hands over, its own part among them.
        hosts: where several workers share each of several hosts. None: exchanges have one level.
        overlap: the part of the shorter one that is saved where a worker computes while a message travels: 1 where it
            has a core to spare for messages; 0 where computing takes so much longer.
        idle: seconds of a message in which it waits for Horovod's next cycle: what a worker computes between two
            messages takes so much less.
    """

    workers: int
    allreduce: Curve
    halves: Curve
    allgather: Curve
    alltoall: Curve
    hosts: HostNetwork | None = None
    overlap: float = 1.0
    idle: float = 0.0

    @classmethod
    def of_links(
        cls,
        workers: int,
        bytes_per_second: float,
        latency: float,
        per_host: int = 1,
        in_host: tuple[float, float] = (READ_IN_HOST, SENT_IN_HOST),
    ) -> "Network":
        """Of workers in a ring, without what processors do to messages. Each waits for Horovod's cycle.

        Args:
            workers: W.
            bytes_per_second: of a host's link, in each direction. A ring goes over it once, however many workers of the
                host are in it.
            latency: seconds from one worker to the next.
            per_host: how many workers share each host; divides W.
            in_host: bytes per second that each worker gets of others of its host, beside all others of it: of
                gradients, and of messages.
        """

        def line(rounds: int, share: float, rate: float = bytes_per_second, least: float = CYCLE_TIME) -> Curve:
            return Curve.of_line(rounds * latency, rounds * share / rate, least if rounds else 0.0)

        around, count, hosts = workers - 1, workers // per_host, None
        if count > 1 and per_host > 1:
            # Each worker sends each of the others its part; over a host's link come those of all its workers.
            read, sent = in_host
            gradients = line(per_host - 1, 1 / per_host, read, least=0.0)
            inside = line(per_host - 1, 1 / per_host, sent)
            hosts = HostNetwork(per_host, gradients, inside, line(count - 1, per_host / count))
        mean, idle = line(2 * around, 1 / workers), max(0.0, CYCLE_TIME - 2 * around * latency) if around else 0.0
        return cls(workers, mean, mean, line(around, 1), line(around, 1 / workers), hosts, idle=idle)
