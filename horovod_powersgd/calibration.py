"""What messages and passes take here: what horovod_powersgd.cost predicts from.

All workers measure at the same time, as they exchange at the same time; what counts is the slowest of them.
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.cost import LONG_MESSAGE, SAMPLES, SIZES, SIZES_IN_HOST, Work, samples_of
from horovod_powersgd.hosts import Host, host_key, host_of
from horovod_powersgd.network import Curve, HostNetwork, Network


class Calibration(ABC):
    """Measures messages and passes. A framework's subclass sends messages, and makes steps.

    Attributes:
        count: of the workers that measure.
        index: this worker's number among them.
        samples: of matrices, as cost.SAMPLES: steps of these tell what passes take.
    """

    count: int
    index: int
    samples: Sequence[Sequence[tuple[int, int]]] = SAMPLES

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that speaks for all."""
        return self.index == 0

    def network(self, gathers: bool = True, levels: bool = False) -> Network:
        """What messages of these workers take; of an allgather, and of two levels, only where it is asked for."""
        mean, halves = (self._curve(partial(self._average, dtype)) for dtype in ("float32", "float16"))
        gather = self._curve(partial(self._gather, self.count), self.count) if gathers else mean
        return Network(self.count, mean, halves, gather, self._hosts() if levels else None)

    def _hosts(self) -> HostNetwork | None:
        """What messages of two levels take; None where the exchange would have one."""
        keys = [host_key() if worker == self.index else 0 for worker in range(self.count)]
        host = host_of(self.largest(keys), self.index)
        if isinstance(host, str):
            return None
        likes = sorted(peers[host.share.place] for peers in host.hosts)
        gradients = self._curve(self._means_of(host), sizes=SIZES_IN_HOST)
        inside, between = (self._curve(partial(self._exchange, whom)) for whom in (host.peers, likes))
        return HostNetwork(host.share.parts, gradients, inside, between)

    def work(self, compressor: Compressor) -> Work:
        """What a compressor's steps take of a worker's processor, while the others' work as well."""
        samples = samples_of(compressor, self.samples)
        return Work.fitted([(shapes, seconds_of(self._step(compressor, shapes), self._slowest)) for shapes in samples])

    def works(self, settings: Mapping[str, Compressor | None]) -> dict[str, Work]:
        """Of each compressor, by the names that they are given with; None takes none."""
        return {name: self.work(compressor) for name, compressor in settings.items() if compressor is not None}

    @abstractmethod
    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all workers', number by number. They go on from here together. A worker that has joined
        (hvd.join) counts as zeros."""

    @abstractmethod
    def _step(self, compressor: Compressor, shapes: Sequence[tuple[int, int]]) -> Callable[[], None]:
        """What makes a step of matrices of these shapes, in single precision, without messages; it is called often."""

    @abstractmethod
    def _average(self, dtype: str, nbytes: int) -> None:
        """Averages so many bytes."""

    @abstractmethod
    def _gather(self, share: int, nbytes: int) -> None:
        """Gathers so many bytes, of which each worker sends one of so many shares."""

    @abstractmethod
    def _exchange(self, whom: Sequence[int], nbytes: int) -> None:
        """Sends each of some workers, this one among them, in ascending order, an equal part of so many bytes, and adds
        up what has come, in single precision."""

    def _means_of(self, host: Host) -> Callable[[int], None]:
        """What lets each worker of a host have its share of the mean of so many bytes of theirs; by messages, unless a
        framework has another way."""
        return partial(self._exchange, host.peers)

    def _slowest(self, nanoseconds: int) -> int:
        return self.largest([nanoseconds])[0]

    def _curve(self, send: Callable[[int], None], share: int = 1, sizes: Sequence[int] = SIZES) -> Curve:
        points: list[tuple[float, float]] = []
        for nbytes in sizes:
            points.append((nbytes / share, seconds_of(partial(send, nbytes), self._slowest)))
            if points[-1][1] > LONG_MESSAGE:
                break
        return Curve(tuple(points))


def seconds_of(run: Callable[[], object], slowest: Callable[[int], int] = int) -> float:
    """What it takes: the median of some times.

    Args:
        run: is called some times, and once before.
        slowest: gives, of each time, in nanoseconds, that of the slowest worker. Without it, this worker's counts.
    """
    run()
    found: list[float] = []
    while len(found) < 2 or (sum(found) < 0.03 and len(found) < 15):
        begin = time.perf_counter()
        run()
        found.append(slowest(int(1e9 * (time.perf_counter() - begin))) / 1e9)
    return statistics.median(found)
