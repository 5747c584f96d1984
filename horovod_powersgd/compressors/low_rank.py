"""Compressors that send a matrix's factors, beside PowerSGD (PowerSGD paper, sections 3 and 4, and appendix)."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.randomness import normal, uniform


class _LowRank(Compressor):
    low_rank = True
    rank: int

    def __post_init__(self) -> None:
        self._check_integer("rank", at_least=1)
        for field in vars(self):
            if field == "error_feedback":
                self._check_bool(field)
            elif field == "seed":
                self._check_integer(field, at_least=0)

    def obstacle(self, rows: int, columns: int) -> str | None:
        rate = rows * columns / (self.amount(rows, columns) * (rows + columns))
        return None if rate > 1 else f"would shrink {rate:.2f} times"

    def amount(self, rows: int, columns: int) -> int:
        return min(self.rank, rows, columns)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return self.amount(rows, columns) * (rows + columns) * itemsize


@dataclass(frozen=True)
class BestRank(_LowRank):
    """Sends the best approximation of that rank, of each worker its own, and averages them: what a compressor of this
    kind can do at best (PowerSGD paper, section 4.2; Eckart and Young 1936).

    Not linear: a singular value decomposition in each step, which is slow, and the workers gather each other's
    rank (n + m) numbers.

    Args:
        rank: of the approximation, at least 1. A matrix with fewer rows or columns uses its smaller side.
        error_feedback: add what one step left out to the next step's gradient.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    rank: int
    error_feedback: bool = True
    linear = False

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp = state.arrays
        u, values, vt = xp.svd(delta)
        p = xp.transpose(u[:, : state.amount] * values[: state.amount])
        q = vt[: state.amount]
        ps, qs = yield Allgather((p, q))
        return _mean_product(xp, ps, qs, state, delta), xp.transpose(p) @ q


@dataclass(frozen=True)
class UnbiasedRank(_LowRank):
    """Sends M U, and makes M U U^T of its mean; U is random, in each step another, the same on all workers, with
    E[U U^T] = I (PowerSGD paper, section 4.1: "unbiased rank r").

    Linear: one allreduce of rank n numbers. The update is right on average, so there is no error feedback; but it
    varies by about m / rank times the gradient's square, and needs a smaller learning rate (the paper took an eighth).

    Args:
        rank: columns of U, at least 1. A matrix with fewer rows or columns uses its smaller side.
        seed: of U.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    rank: int
    seed: int = 0
    error_feedback = False
    linear = True

    def obstacle(self, rows: int, columns: int) -> str | None:
        return None if columns > self.amount(rows, columns) else "has no more columns than the rank"

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, columns = state.arrays, state.shape[1]
        numbers = normal(xp, state.key, state.step, xp.arange(columns * state.amount))
        u = xp.like(xp.reshape(numbers, (columns, -1)), delta)
        mean = yield AllreduceMean(delta @ u)
        return mean @ xp.transpose(u) / xp.like(state.amount, delta), None

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return self.amount(rows, columns) * rows * itemsize


@dataclass(frozen=True)
class Atomo(_LowRank):
    """Sends some of a matrix's singular vectors, of each worker its own, chosen at random with probabilities p that
    fall with the singular values, and scales them by 1 / p, so that the mean is right (Wang et al., "ATOMO:
    Communication-efficient Learning via Atomic Sparsification", NeurIPS 2018, algorithm 1, in its spectral form).

    Exactly `rank` are sent, where ATOMO sends as many on average: a systematic sample has the same probabilities, and
    messages of one length. (The PowerSGD paper's experiments drew again until there were as many, which is not
    unbiased.)

    Not linear: a singular value decomposition in each step, which is slow, and the workers gather each other's
    rank (n + m) numbers.

    Args:
        rank: singular vectors that are sent, at least 1. A matrix with fewer rows or columns uses its smaller side.
        error_feedback: add what one step left out to the next step's gradient. Neither ATOMO nor the PowerSGD paper
            does; with it the memory grows to thousands of times the gradient, since the estimate can be longer than
            what it estimates.
        seed: of the choice.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    rank: int
    error_feedback: bool = False
    seed: int = 0
    linear = False

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp = state.arrays
        u, values, vt = xp.svd(delta)
        chances = self._chances(xp, values, state.amount)
        # A comb with teeth at a distance of one, put down at random, meets each chance once at most.
        worker = xp.reshape(xp.integers(state.worker), (1,))
        teeth = uniform(xp, state.key, state.step, worker) + xp.cast(xp.arange(state.amount), "float64")
        teeth = xp.like(teeth, chances)
        before = xp.sum(xp.cast(xp.cumsum(chances)[None, :] <= teeth[:, None], "int64"), axis=1)
        places = xp.where(before < min(state.shape), before, min(state.shape) - 1)
        scale = xp.take(xp.cast(values, "float64") / chances, places)
        p = xp.like(scale, delta)[:, None] * xp.take(xp.transpose(u), places)
        q = xp.take(vt, places)
        ps, qs = yield Allgather((p, q))
        return _mean_product(xp, ps, qs, state, delta), xp.transpose(p) @ q

    def _chances(self, xp, values, amount):
        """In proportion to the singular values, but none above 1; they add up to the amount. float64."""
        values = xp.cast(values, "float64")
        # Where there are fewer vectors than are sent, others are sent with them, times nothing.
        values = values + 1e-12 * values[0] + 1e-300
        certain = values < 0
        for _ in range(self.rank):
            left = xp.cast(amount, "float64") - xp.sum(xp.cast(certain, "float64"))
            shares = left * values / xp.sum(xp.where(certain, values * 0, values))
            certain = certain | (shares >= 1)
        left = xp.cast(amount, "float64") - xp.sum(xp.cast(certain, "float64"))
        rest = xp.sum(xp.where(certain, values * 0, values))
        return xp.where(certain, values * 0 + 1, left * values / xp.where(rest > 0, rest, rest + 1))


def _mean_product(xp, ps, qs, state, delta):
    """The mean of the workers' P^T Q, from (W, r, n) and (W, r, m)."""
    rows, columns = state.shape
    return xp.transpose(xp.reshape(ps, (-1, rows))) @ xp.reshape(qs, (-1, columns)) / xp.like(state.workers, delta)
