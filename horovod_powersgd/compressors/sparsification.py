"""Compressors that send some of a matrix's entries (PowerSGD paper, appendix, "Compressors")."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.randomness import draw, subset


class _Sparsifier(Compressor):
    ratio: float

    def __post_init__(self) -> None:
        self._check_number("ratio", "above 0 and at most 1", lambda ratio: 0 < ratio <= 1)
        self._check_bool("error_feedback")
        if "seed" in vars(self):
            self._check_integer("seed", at_least=0)

    def amount(self, rows: int, columns: int) -> int:
        # What is a whole number but for rounding is meant.
        return max(1, int(self.ratio * rows * columns + 1e-9))

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return self.amount(rows, columns) * itemsize


class _SharedPlaces(_Sparsifier):
    """All workers send the same entries, so that their values can be added up."""

    linear = True

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, size = state.arrays, state.shape[0] * state.shape[1]
        places = self._places(state, size)
        own = xp.take(xp.reshape(delta, (-1,)), places)
        mean = yield AllreduceMean(own)
        return xp.scatter(size, places, mean), xp.scatter(size, places, own)

    def _places(self, state, size: int):
        """Where those entries are, in this step."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomK(_SharedPlaces):
    """Sends random entries of each matrix, in each step others, the same on all workers (Random K; PowerSGD paper,
    appendix; Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, definition 2.2).

    Linear: one allreduce of floor(ratio n m) numbers, at least one. In the worker's memory stays all the rest.

    Args:
        ratio: the fraction of the entries that is sent, above 0 and at most 1. They arrive as they are, not scaled.
        error_feedback: add what one step left out to the next step's gradient.
        seed: of the choice.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    ratio: float
    error_feedback: bool = True
    seed: int = 0

    def _places(self, state, size):
        return subset(state.arrays, state.key, state.step, size, state.amount)


@dataclass(frozen=True)
class RandomBlock(_SharedPlaces):
    """Sends a block of each matrix, row after row, from a random place on, the same on all workers (Random Block;
    PowerSGD paper, appendix).

    Linear: one allreduce of floor(ratio n m) numbers, at least one. The entries lie together, which spares looking for
    them; after the last one comes the first. Every entry is as likely to be sent as any other.

    Args:
        ratio: the fraction of the entries that is sent, above 0 and at most 1. They arrive as they are, not scaled.
        error_feedback: add what one step left out to the next step's gradient.
        seed: of the choice.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    ratio: float
    error_feedback: bool = True
    seed: int = 0

    def _places(self, state, size):
        xp = state.arrays
        start = draw(xp, state.key, state.step, xp.arange(1)) % size
        return (start + xp.arange(state.amount)) % size


@dataclass(frozen=True)
class TopK(_Sparsifier):
    """Sends the entries of each matrix that are largest in magnitude, of each worker its own (Top K; PowerSGD paper,
    appendix; Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017).

    Not linear: the workers gather each other's floor(ratio n m) numbers, at least one, and their places, four bytes
    each.

    Args:
        ratio: the fraction of the entries that is sent, above 0 and at most 1.
        error_feedback: add what one step left out to the next step's gradient.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    ratio: float
    error_feedback: bool = True
    linear = False

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, size = state.arrays, state.shape[0] * state.shape[1]
        flat = xp.reshape(delta, (-1,))
        own_places = xp.top_k(abs(flat), state.amount)
        own = xp.take(flat, own_places)
        values, places = yield Allgather((own, xp.cast(own_places, "int32")))
        total = xp.scatter(size, xp.integers(places), values)
        return total / xp.like(state.workers, delta), xp.scatter(size, own_places, own)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return self.amount(rows, columns) * (itemsize + 4)
