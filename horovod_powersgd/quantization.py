"""Averages in 8 bits a number, in plain numpy: what every framework does alike.

Horovod reduces no such numbers. So either all workers gather what each sends, and add it up: one round. Or each worker
is sent its slice of it by all, adds that up, and rounds the mean again, and all gather the slices: two rounds, and
fewer bytes where workers are many. What the second rounding changes, the owner of the slice adds to its own part, times
W: the mean of all workers' parts is the mean that they get, whichever way it went.

Numbers come in rows, those of a bucket one after the other. What of a row lies in one slice is a segment. Its unit is
its largest number / LEVELS, or NaN where a number is not finite. A number travels as a code: how often the unit goes
into it, rounded to the nearest.
"""

from collections.abc import Sequence

import numpy as np

# The largest code.
LEVELS = 127
# Where there are so many workers, or more, an average takes two rounds. docs/speed.md has the measurements.
TWO_ROUNDS = 4


def slice_count(workers: int) -> int:
    """In how many slices so many workers average: each owns one, or all own the only one."""
    return workers if workers >= TWO_ROUNDS else 1


def rows_of(shape: Sequence[int], row: int | None) -> list[tuple[int, int]]:
    """How many rows a matrix of this shape has, and how long they are; of a flat tensor, which `row` divides
    (QuantizedMean), first the whole rows and then what is left."""
    if row is None:
        return [(shape[0], shape[1])]
    whole, rest = divmod(shape[0], row)
    return [(number, length) for number, length in ((whole, row), (1, rest)) if number * length]


class Slices:
    """Rows of numbers, one after the other, in slices of equal size.

    Args:
        lengths: of the rows.
        count: of slices, from slice_count.

    Attributes:
        size: of each slice, in numbers; zeros after the last row fill it up.
        segments: (count, K) int64: the lengths of each slice's segments, and zeros where it has fewer than K.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, count: int):
        numbers, self.count = int(np.sum(lengths)), count
        self.size = -(-numbers // self.count)
        ends = np.union1d(np.cumsum(lengths), self.size * np.arange(1, self.count + 1))
        slice_of = (ends - 1) // self.size
        counts = np.bincount(slice_of, minlength=self.count)
        self.segments = np.zeros((self.count, counts.max()), np.int64)
        number_in_slice = np.arange(len(ends)) - (np.cumsum(counts) - counts)[slice_of]
        self.segments[slice_of, number_in_slice] = np.diff(ends, prepend=0)

    def nbytes(self, itemsize: int) -> int:
        """Of what travels of one slice: a unit for each segment, of as many bytes as a number has, and the codes."""
        return self.segments.shape[1] * itemsize + self.size


def traffic(lengths: Sequence[int], workers: int, itemsize: int, workers_per_host: int = 1) -> tuple[int, int]:
    """What a worker hands to Horovod for an average, and what it is handed back, in bytes. Of several that stand for
    one, their host, each sends a part of every message to one worker of each host."""
    hosts = workers // workers_per_host
    slices = Slices(lengths, slice_count(hosts))
    nbytes, is_one_round = -(-slices.nbytes(itemsize) // workers_per_host), slices.count == 1
    if workers_per_host > 1:
        both = hosts * nbytes * (1 if is_one_round else 2)
        return both, both
    return (nbytes, workers * nbytes) if is_one_round else ((workers + 1) * nbytes, 2 * workers * nbytes)


def mean(
    everyones: Sequence[np.ndarray], lengths: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """All workers' average.

    Args:
        everyones: each worker's rows, one after the other, (numbers,) float32 or float64.
        lengths: of the rows.

    Returns:
        (numbers,) the mean, and for each worker its part: the parts' mean is the mean, to rounding.
    """
    workers, numbers = len(everyones), int(np.sum(lengths))
    slices = Slices(lengths, slice_count(workers))
    total, parts = np.zeros((slices.count, slices.size), everyones[0].dtype), []
    for theirs in everyones:
        padded = np.zeros((slices.count, slices.size), theirs.dtype)
        padded.reshape(-1)[:numbers] = theirs
        units, codes = encode(padded, slices.segments)
        parts.append(decode(units, codes, slices.segments))
        total += decode(units / workers, codes, slices.segments)
    if slices.count > 1:
        rounded = decode(*encode(total, slices.segments), slices.segments)
        for worker, part in enumerate(parts):
            part[worker] += workers * (rounded[worker] - total[worker])
        total = rounded
    return total.reshape(-1)[:numbers], [part.reshape(-1)[:numbers] for part in parts]


def encode(numbers: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units (slices, K) and codes (slices, size), both in the numbers' dtype.

    Args:
        numbers: (slices, size).
        segments: Slices.segments.
    """
    starts, largest = np.cumsum(segments).reshape(segments.shape) - segments, np.zeros(segments.shape, numbers.dtype)
    largest[segments > 0] = np.maximum.reduceat(abs(numbers.reshape(-1)), starts[segments > 0])
    units = np.where(np.isfinite(largest), largest / LEVELS, np.nan).astype(numbers.dtype)
    each = np.repeat(units.reshape(-1), segments.reshape(-1)).reshape(numbers.shape)
    # Too small a unit could not be told from zero: such numbers travel as zeros.
    counted = each >= np.finfo(numbers.dtype).tiny
    return units, np.rint(np.divide(numbers, each, out=np.zeros_like(numbers), where=counted))


def decode(units: np.ndarray, codes: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """(slices, size): the numbers that these units and codes stand for."""
    return codes * np.repeat(units.reshape(-1), segments.reshape(-1)).reshape(codes.shape)
