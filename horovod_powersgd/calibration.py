"""What messages and passes take here, of a model: what horovod_powersgd.cost predicts from.

All workers measure at the same time, as they exchange at the same time; what counts is the slowest of them.
"""

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np

from horovod_powersgd.buckets import BUCKET_BYTES
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.cost import ITEMSIZE, SAMPLE_BYTES, SAMPLE_BYTES_BEFORE, SAMPLE_MATRICES, Work, samples_of
from horovod_powersgd.hosts import Host, host_key, host_of
from horovod_powersgd.network import Curve, HostNetwork, Network
from horovod_powersgd.quantization import slice_count

# Messages of so many bytes are measured, up to what the model has.
SIZES = [2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26]
# Of half precision, from here on: less takes what it does in single precision.
FIRST_HALVES = 2**18
# Of these and more, each byte is taken to cost what it costs on average in this size and in those next to it: the same
# message may take half as long again, or not, as luck has it.
FIRST_LONG = 2**20
# What is measured is repeated for so many seconds (passes, in a job, for twice as many), and so often at most; and
# larger messages than the first that takes LONGEST seconds are not measured. In a job, whose steps wait meanwhile, and
# before a job, where nobody waits, and where those of Gloo are told from many: on a busy core they may take 1 ms, or 4,
# a tick of the kernel's.
SECONDS, SECONDS_BEFORE = 0.005, 0.3
LONGEST, LONGEST_BEFORE = 0.04, 1.0
MOST_TIMES, MOST_BEFORE = 6, 30
# Before a job at least so often: what a link has no room for, TCP loses, and messages take half as long again; and the
# turns of workers that share cores differ as much.
LEAST_BEFORE, LEAST_TURNS_BEFORE = 3, 6
# A message repeats so many numbers: a prime number, so that the rows of a matrix of them differ, and so many that a
# processor cannot foresee how halves are rounded.
BLOCK = 2**20 + 7


class Calibration(ABC):
    """Measures messages and passes of a model. A framework's subclass sends messages, and makes steps.

    Attributes:
        count: of the workers that measure.
        index: this worker's number among them.
        shapes: of the model's tensors.
        matrix_shape: as layout_of's.
        on_processor: whether that computes; else a GPU does, and leaves the processor to messages.
        bucket_bytes: that buckets have.
        most: how many matrices a step has at most.
        hurries: whether a job waits meanwhile.
        clock: nanoseconds that steps take; best without those in which others have the core.
    """

    count: int
    index: int
    shapes: Sequence[tuple[int, ...]]
    matrix_shape: Callable
    on_processor: bool
    bucket_bytes = BUCKET_BYTES
    most = SAMPLE_MATRICES
    hurries = True
    clock: Callable[[], int] = staticmethod(time.perf_counter_ns)

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that speaks for all."""
        return self.index == 0

    def network(self, gathers: bool = True, levels: bool = False) -> Network:
        """What messages of these workers take; of gathers, and of two levels, only where it is asked for."""
        mean = self._curve(partial(self._average, "float32"), known=[(SIZES[0], self._shortest)])
        small = [(nbytes, seconds) for nbytes, seconds in mean.points if nbytes < FIRST_HALVES]
        halves = self._curve(partial(self._average, "float16"), known=small, dtype="float16")
        gather = self._curve(partial(self._gather, self.count), self.count) if gathers else mean
        in_slices = gathers and slice_count(self.count) > 1
        exchange = self._curve(partial(self._exchange, range(self.count), adds=False)) if in_slices else gather
        hosts = self._hosts() if levels else None
        overlap = self._overlap(mean) if self._agreed[0] else 1.0
        return Network(self.count, mean, halves, gather, exchange, hosts, overlap, self._idle(mean))

    def _idle(self, mean: Curve) -> float:
        """Network.idle, of what is sent after computing for a part of a message's time: no longer, so that what
        disturbs a worker does not make it miss the cycle."""
        computing, message = 0.6 * mean(SIZES[0]), partial(self._average, "float32", SIZES[0])

        def one_after_the_other() -> None:
            end = time.perf_counter() + computing
            while time.perf_counter() < end:
                pass
            message()

        return min(computing, max(0.0, computing + mean(SIZES[0]) - self._seconds_of(one_after_the_other)))

    def _overlap(self, mean: Curve) -> float:
        """Network.overlap, of a message that takes as long as some passes over memory."""
        first, second = np.ones((2, 2**20), np.float32)
        nbytes = int(next((nbytes for nbytes, seconds in mean.points if seconds > 4e-3), mean.points[-1][0]))

        def compute() -> None:
            for _ in range(passes):
                np.add(first, second, out=second)

        def both() -> None:
            wait = self._begin_average("float32", nbytes, self._parts("float32", nbytes))
            compute()
            wait()

        passes, message = 1, mean(nbytes)
        once = self._seconds_of(compute)
        passes = max(1, math.ceil(message / once))
        computing, together = passes * once, self._seconds_of(both)
        return min(1.0, max(0.0, (computing + message - together) / min(computing, message)))

    def _hosts(self) -> HostNetwork | None:
        """What messages of two levels take; None where the exchange would have one."""
        keys = [host_key() if worker == self.index else 0 for worker in range(self.count)]
        host = host_of(self.largest(keys), self.index)
        if isinstance(host, str):
            return None
        likes = sorted(peers[host.share.place] for peers in host.hosts)
        gradients = self._curve(self._means_of(host))
        inside, between = (self._curve(partial(self._exchange, whom)) for whom in (host.peers, likes))
        return HostNetwork(host.share.parts, gradients, inside, between)

    def work(self, compressor: Compressor, workers: int | None = None) -> Work:
        """What a compressor's steps take of a worker's processor, while the others' work as well.

        Args:
            workers: from whom there is something to decode in a step; None: those that measure.
        """
        on_processor, bucket_bytes = self._agreed
        nbytes = SAMPLE_BYTES if self.hurries else SAMPLE_BYTES_BEFORE
        samples = samples_of(compressor, self.shapes, self.matrix_shape, self.most, nbytes)
        if not samples:
            return Work.fitted([])
        steps = [self._step(compressor, shapes, workers or self.count) for shapes in samples]
        measured = zip(samples, self.in_turn(steps), strict=True)
        return Work.fitted(measured, on_processor)._replace(bucket_bytes=bucket_bytes)

    def works(self, settings: Mapping[str, Compressor | None], workers: int | None = None) -> dict[str, Work]:
        """Of each compressor, by the names that they are given with; None takes none."""
        return {name: self.work(compressor, workers) for name, compressor in settings.items() if compressor is not None}

    def in_turn(self, steps: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of each of some steps without messages, one at least, which take turns. At their end all wait for the
        last worker: where workers share cores, some compute before others begin, and each finds its own steps short."""
        own, seconds = list[list[int]](), 2 * SECONDS if self.hurries else SECONDS_BEFORE

        def together() -> None:
            own.extend(take_turns(steps, self.clock) for _ in range(number))
            self._average("float32", SIZES[0])

        [once] = self.largest([_nanoseconds(lambda: take_turns(steps))])
        number = max(1, round(1e9 * seconds / 2 / once))
        least = 1 if self.hurries else LEAST_TURNS_BEFORE
        taken = statistics.median(times_of(together, seconds, self.largest, least))
        mine = self.largest([max(1, statistics.median_low(times)) for times in zip(*own, strict=True)])
        scale = max(1.0, 1e9 * (taken - self._shortest) / (number * sum(mine)))
        return [scale * nanoseconds / 1e9 for nanoseconds in mine]

    @cached_property
    def _agreed(self) -> tuple[bool, int]:
        """Where workers differ, as the slowest: whether a processor computes, and the bytes of a bucket."""
        on_processor, bucket_bytes = self.largest([int(self.on_processor), self.bucket_bytes])
        return bool(on_processor), bucket_bytes

    @cached_property
    def _shortest(self) -> float:
        """Seconds of the shortest message."""
        send = partial(self._average, "float32", SIZES[0])
        send()  # the first message of its kind takes longer
        return self._seconds_of(send)

    def all_there(self) -> bool:
        """Whether no worker has joined (hvd.join): such a one takes part in means only."""
        return self.largest([-1]) == [-1]

    @abstractmethod
    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all workers', number by number. They go on from here together. A worker that has joined
        (hvd.join) counts as zeros."""

    @abstractmethod
    def _step(
        self, compressor: Compressor, shapes: Sequence[tuple[int, int]], workers: int
    ) -> Callable[[], None]:
        """What makes a step of matrices of these shapes, in single precision, without messages, as if all of so many
        workers sent what this one sends; it is called often."""

    @abstractmethod
    def _begin_average(self, dtype: str, nbytes: int, parts: int) -> Callable[[], object]:
        """Begins to average so many bytes, of so many tensors; gives what waits for it."""

    @abstractmethod
    def _gather(self, share: int, nbytes: int) -> None:
        """Gathers so many bytes, of which each worker sends one of so many shares."""

    @abstractmethod
    def _exchange(self, whom: Sequence[int], nbytes: int, adds: bool = True) -> None:
        """Sends each of some workers, this one among them, in ascending order, an equal part of so many bytes, and adds
        up what has come, in single precision, where that is asked for."""

    @abstractmethod
    def _renew(self, dtype: str, nbytes: int) -> bool:
        """Makes so many bytes to send, where there are none yet; of half precision anew, where a mean has replaced
        them: numbers as gradients are, each worker its own. Gloo adds up equal halves in 80% of the time, and zeros in
        40%. Returns whether it has made any."""

    def _renew_together(self, dtype: str, nbytes: int) -> None:
        if self._renew(dtype, nbytes):
            self.largest([0])

    def _average(self, dtype: str, nbytes: int) -> None:
        self._begin_average(dtype, nbytes, self._parts(dtype, nbytes))()

    @property
    def _parameters(self) -> int:
        """How many numbers the model has."""
        return sum(map(math.prod, self.shapes))

    def _parts(self, dtype: str, nbytes: int) -> int:
        """Of how many tensors so many bytes of gradients would be, on average."""
        part = nbytes / np.dtype(dtype).itemsize / max(1, self._parameters)
        return max(1, round(len(self.shapes) * min(1.0, part)))

    def _means_of(self, host: Host) -> Callable[[int], None]:
        """What lets each worker of a host have its share of the mean of so many bytes of theirs; by messages, unless a
        framework has another way."""
        return partial(self._exchange, host.peers)

    def _seconds_of(self, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """What it takes, typically; before a job, where `before` is called each time."""
        if self.hurries:
            return _typical(times_of(run, SECONDS, self.largest))
        run()
        return _typical(times_of(run, SECONDS_BEFORE, self.largest, LEAST_BEFORE, MOST_BEFORE, before))

    def _curve(
        self,
        send: Callable[[int], None],
        share: int = 1,
        known: Sequence[tuple[float, float]] = (),
        dtype: str = "float32",
    ) -> Curve:
        points, of_model = list(known), ITEMSIZE * self._parameters
        longest = LONGEST if self.hurries else LONGEST_BEFORE
        send(SIZES[0])  # the first message of its kind takes longer
        for size in SIZES[len(known) :]:
            if len(points) > 1 and (points[-1][1] > longest or share * points[-1][0] >= of_model):
                break
            renew = partial(self._renew_together, dtype, size)
            renew()  # so that making it takes none of the message's time
            points.append((size / share, self._seconds_of(partial(send, size), renew)))
        return Curve(tuple(_smoothed(points, FIRST_LONG / share)))


def _smoothed(points: Sequence[tuple[float, float]], first_long: float) -> list[tuple[float, float]]:
    """(bytes, seconds) of messages, where a byte of those of so many bytes and more costs what FIRST_LONG says."""
    shortest = min(seconds for _, seconds in points)
    per_byte = [max(0.0, seconds - shortest) / nbytes for nbytes, seconds in points]
    long = [i for i, (nbytes, _) in enumerate(points) if nbytes >= first_long]
    found = list(points)
    for i in long:
        beside = [per_byte[j] for j in (i - 1, i, i + 1) if j in long]
        found[i] = points[i][0], shortest + points[i][0] * statistics.mean(beside)
    return found


def _typical(times: Sequence[float]) -> float:
    """Of a few short messages the median, since what disturbs one of them counts most; of others, whose times differ by
    luck, the mean of what is neither among the shortest nor among the longest ones."""
    median = statistics.median(times)
    if median < SECONDS and len(times) <= MOST_TIMES:
        return median
    beside = len(times) // 4
    return statistics.mean(sorted(times)[beside : len(times) - beside])


def take_turns(steps: Sequence[Callable[[], object]], clock: Callable[[], int] = time.perf_counter_ns) -> list[int]:
    """Nanoseconds of each of some steps, one after the other, as a model's matrices come: what one has left in caches,
    others displace."""
    return [_nanoseconds(step, clock) for step in steps]


def times_of(
    run: Callable[[], object],
    seconds: float = SECONDS,
    largest: Callable[[list[int]], Iterable[int]] = list,
    least: int = 1,
    most: int = MOST_TIMES,
    before: Callable[[], object] = lambda: None,
) -> list[float]:
    """What it takes, in seconds, some times.

    Args:
        run: is called some times.
        seconds: that the times have together, more or less. A first time that is longer counts, and is one of `least`;
            else it does not count.
        largest: of each of some numbers, the largest of all workers', whose slowest then counts; they go on together,
            and are to begin together. Without it, this one does.
        least: how many times there are at least; most: at most.
        before: is called before each time, and does not count.
    """

    def once() -> int:
        before()
        return _nanoseconds(run)

    [first] = largest([once()])
    is_long = first > 1e9 * seconds
    times = least - 1 if is_long else max(2, least, min(most, int(1e9 * seconds / first)))
    more = largest([once() for _ in range(times)]) if times else []
    return [found / 1e9 for found in ([first, *more] if is_long else more)]


def average_of(message: str) -> str:
    """The name of the average in 8 bits that a message of this name belongs to.

    Where averages are made in slices, each worker has rounded its own. One worker that stands for all has those that it
    sent: with its own one in place of all, a factor's columns would be the same, and orthogonalized again and again.
    """
    return message.rpartition(".")[0]


def _nanoseconds(run: Callable[[], object], clock: Callable[[], int] = time.perf_counter_ns) -> int:
    begin = clock()
    run()
    return clock() - begin
