"""What messages and passes take here: what horovod_powersgd.cost predicts from.

All workers measure at the same time, as they exchange at the same time; what counts is the slowest of them.
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from horovod_powersgd.cost import LONG_MESSAGE, SIZES, Curve, Network


class Calibration(ABC):
    """Measures messages. A framework's subclass sends them, and measures what passes take.

    Attributes:
        count: of the workers that measure.
    """

    count: int

    def network(self, gathers: bool = True) -> Network:
        """What messages of these workers take; of an allgather, only where it is asked for."""
        mean, halves = (self._curve(partial(self._average, dtype)) for dtype in ("float32", "float16"))
        gather = self._curve(partial(self._gather, self.count), self.count) if gathers else mean
        return Network(self.count, mean, halves, gather)

    @abstractmethod
    def _average(self, dtype: str, nbytes: int) -> None:
        """Averages so many bytes."""

    @abstractmethod
    def _gather(self, share: int, nbytes: int) -> None:
        """Gathers so many bytes, of which each worker sends one of so many shares."""

    @abstractmethod
    def _slowest(self, nanoseconds: int) -> int:
        """The largest of all workers' numbers. They go on from here together."""

    def _curve(self, send: Callable[[int], None], share: int = 1) -> Curve:
        points: list[tuple[float, float]] = []
        for nbytes in SIZES:
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
