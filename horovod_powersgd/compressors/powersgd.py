"""PowerSGD: its configuration, one for every framework, and its algorithm."""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from horovod_powersgd.compressors.collectives import AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.factors import initial_factor, orthogonalize, resized
from horovod_powersgd.randomness import SPARE, random_factor

WIRE_DTYPES = (None, "float16", "int8")
MEMORY_DTYPES = (None, "bfloat16", "float16")
# Half-steps of a step that renews the subspace: from a random Q, with two more than usual, the approximation is as good
# as one from a warm start, and better. benchmarks/renewal.py measures it.
RENEWAL = 4


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """PowerSGD gradient compression (Vogels, Karimireddy, Jaggi, NeurIPS 2019, Algorithms 1 and 2).

    Pass it as ``compression`` to DistributedOptimizer. All workers must use the same values.

    Args:
        rank: columns of the factors P and Q, at least 1. Higher: more accurate, more bytes. A matrix with fewer
            rows or columns than this uses its smaller side.
        min_compression_rate: a matrix is compressed when its factors hold at least this many times fewer numbers
            than it does, and is averaged as it is otherwise. Lower: more tensors compressed. 0 compresses every matrix.
        num_iters_per_step: half-steps of the subspace iteration per step, each with one allreduce. 2 is the paper
            (P, then Q); 1 alternates between P and Q from step to step, which halves the bytes; more half-steps come
            closer to the best approximation of that rank.
        warmup_steps: this many first steps are exchanged uncompressed.
        warm_start: start each step from the last step's factor (paper, section 3). Without it, every step starts
            from a fresh random Q.
        error_feedback: add what one step's compression left out to the next step's gradient (paper, section 3).
            It costs memory of the gradients' size; without it the results are biased.
        wire_dtype: None: factors travel in the precision that they are computed in. "float16" or "int8": they travel in
            half precision, or in 8 bits a number, each column divided by its largest entry
            (horovod_powersgd.quantization); what rounding loses stays in the error-feedback memory. In half precision
            they are divided by a power of two near the largest entry of the factor before, and the first step travels
            in full precision. In 8 bits they do not add up in Horovod's hands: hvd.join() is refused then.
        seed: of the random starting Q, a non-negative integer.
        refresh_every: every that many steps the subspace is sought anew, from a fresh random Q and with at least four
            half-steps. A warm start can miss, for as long as training lasts, what is orthogonal to it (PowerSGD+, Xie,
            Chen, Yuan, arXiv 2509.11254). None: never.
        hierarchical: exchange in two levels: the workers of a host average their gradients among themselves, and each
            then multiplies, and remembers, a share of every matrix's rows (horovod_powersgd.hosts). That is PowerSGD
            with one worker a host, and it is between hosts that wire_dtype counts. It takes several hosts with equally
            many workers, more than one; else compression_stats().flat_because says what is missing. hvd.join() is
            refused. None: where that is never slower, which so far is nowhere.
        memory_dtype: None: the error-feedback memory is in single precision, and in double precision for gradients in
            that. "bfloat16" or "float16": in 16 bits a number, half of the memory, rounded stochastically
            (horovod_powersgd.rounding); "float16" has three bits more, and takes longer.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.

    Example:
        >>> PowerSGD(rank=2).rank
        2
    """

    rank: int = 4
    min_compression_rate: float = 2.0
    num_iters_per_step: int = 2
    warmup_steps: int = 0
    warm_start: bool = True
    error_feedback: bool = True
    wire_dtype: str | None = None
    seed: int = 0
    refresh_every: int | None = None
    hierarchical: bool | None = None
    memory_dtype: str | None = None
    low_rank = True

    def __post_init__(self) -> None:
        self._check_integer("rank", at_least=1)
        self._check_integer("num_iters_per_step", at_least=1)
        self._check_integer("warmup_steps", at_least=0)
        self._check_integer("seed", at_least=0)
        self._check_bool("warm_start")
        self._check_bool("error_feedback")
        self._check_number("min_compression_rate", "0 or more", lambda rate: rate >= 0)
        self._check_dtype("wire_dtype", WIRE_DTYPES)
        self._check_dtype("memory_dtype", MEMORY_DTYPES)
        object.__setattr__(self, "linear", self.wire_dtype != "int8")
        if self.refresh_every is not None:
            self._check_integer("refresh_every", at_least=1)
        if self.hierarchical is not None:
            self._check_bool("hierarchical")

    def _check_dtype(self, field: str, allowed: tuple) -> None:
        value = getattr(self, field)
        if value not in allowed:
            error = ValueError if isinstance(value, str) else TypeError
            raise error(f"PowerSGD: {field} must be None, {allowed[1]!r} or {allowed[2]!r}, not {value!r}")

    def obstacle(self, rows: int, columns: int) -> str | None:
        rate = rows * columns / (self.amount(rows, columns) * (rows + columns))
        if rate >= self.min_compression_rate:
            return None
        return f"would shrink {rate:.2f} times, below min_compression_rate={self.min_compression_rate}"

    def amount(self, rows: int, columns: int) -> int:
        return min(self.rank, rows, columns)

    @property
    def alternates(self) -> bool:
        """Whether one step ends with P and the next with Q."""
        return self.num_iters_per_step % 2 == 1

    def renews(self, step: int) -> bool:
        """Whether the step that comes after so many steps renews the subspace; in TensorFlow both are tensors."""
        if self.refresh_every is None:
            return False
        # Not ==, which compares identities in the graphs of TensorFlow 1.
        return (step > 0) & (step % self.refresh_every < 1)

    def sends_halves(self, step: int) -> bool:
        # Those of the first step do not: nobody knows yet how large they are.
        return self.wire_dtype == "float16" and step > self.warmup_steps

    def half_steps(self, renews: bool) -> int:
        """Of a step that renews the subspace, or does not."""
        more = max(0, RENEWAL - self.num_iters_per_step)
        return self.num_iters_per_step + (more + more % 2 if renews else 0)

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        """One worker's side of the exchange of one matrix: paper, Algorithm 1, within Algorithm 2, lines 8 to 11.

        PyTorch and TensorFlow have a faster way of their own. Called in a graph of TensorFlow, as part of a compressor
        of one's own, this one needs an even number of half-steps, no refresh_every, and no half precision.

        Args:
            delta: (n, m), gradient plus memory; finite.
            state: keeps the last factor, and whether it is Q.

        Yields:
            AllreduceMean or QuantizedMean, once for each half-step, which multiplies delta by an orthonormal basis of
            one factor to get the other factor.

        Returns:
            (P^ Q^T, P^ Q_w^T): the update, and this worker's part of it, each (n, m).
        """
        xp, (rows, columns) = state.arrays, state.shape
        rank = state.amount or self.amount(rows, columns)  # a generator function around this one knows of no amount
        renews, is_q = self.renews(state.step), True
        # What is kept has one dtype in all steps, delta's.
        dtype = np.float64 if "float64" in str(delta.dtype) else np.float32
        last = state.get("factor", initial_factor(state.name, columns, rank, self.seed).astype(dtype))
        if renews or not self.warm_start:
            factor = random_factor(xp, state.key, state.step, columns, rank)
        else:
            factor = last
            if self.alternates:
                is_q = bool(state.get("factor_is_q", np.array(True)))
        factor = xp.like(factor, delta)
        orthogonal = getattr(xp, "orthogonalize", orthogonalize)  # numpy's is the plain one
        for _ in range(self.half_steps(renews)):
            spare = functools.partial(random_factor, xp, state.key, SPARE, columns if is_q else rows, rank)
            if factor.shape[1] != rank:  # Accordion's doing; the frameworks' own ways have their own code for it
                factor = resized(factor, rank, spare())
            basis = orthogonal(factor, spare)                                   # Q^ (or P^)
            own = (delta if is_q else xp.transpose(delta)) @ basis              # delta_w Q^ (or delta_w^T P^)
            if self.wire_dtype == "int8":
                parts = yield QuantizedMean(xp.transpose(own))                  # a unit for each column
                factor, own = (xp.transpose(part) for part in parts)            # P (or Q)
            elif self.sends_halves(state.step):
                scale = scale_of_halves(xp, last, last.shape[0] / own.shape[0])
                sent = xp.cast(own * scale, "float16")
                mean = yield AllreduceMean(sent)
                factor, own = xp.like(mean, delta) / scale, xp.like(sent, delta) / scale
            else:
                factor = yield AllreduceMean(own)
            last, is_q = factor, not is_q
        state.put("factor", factor)
        if self.alternates:
            state.put("factor_is_q", np.array(is_q))
        if is_q:
            return basis @ xp.transpose(factor), basis @ xp.transpose(own)      # P^ Q^T, P^ Q_w^T
        return factor @ xp.transpose(basis), own @ xp.transpose(basis)          # P Q^^T, P_w Q^^T

    def _lengths(self, rows: int, columns: int, step: int) -> list[int]:
        """Of the factors that are sent in a step."""
        # The first factor after the warm-up and after a renewal is P; from then on they take turns.
        start = self.warmup_steps
        if self.refresh_every is not None and self.num_iters_per_step % 2:
            start = max(start, step // self.refresh_every * self.refresh_every)
        half_steps = self.half_steps(self.renews(step))
        makes_p = not self.warm_start or (step - start) * self.num_iters_per_step % 2 == 0
        return [rows if half_step % 2 != makes_p else columns for half_step in range(half_steps)]

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return sum(self.round_bytes(rows, columns, itemsize, step))

    def round_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> list[int]:
        lengths, rank = self._lengths(rows, columns, step), self.amount(rows, columns)
        if self.wire_dtype == "int8":  # and a unit for each column
            return [rank * (length + itemsize) for length in lengths]
        return [rank * length * (2 if self.sends_halves(step) else itemsize) for length in lengths]

    def quantized_rows(self, rows: int, columns: int, step: int = 0) -> list[list[int]]:
        if self.wire_dtype != "int8":
            return []
        return [[length] * self.amount(rows, columns) for length in self._lengths(rows, columns, step)]


def scale_of_halves(xp, last, longer):
    """What a factor is multiplied by before it travels in half precision: a power of two that brings its largest entry
    near 1 where it is as large as the last factor. It can be 10,000 times as large.

    Args:
        xp: the framework's arrays.
        last: the factor that was averaged last, which all workers know.
        longer: how many times as long as the factor's its columns are, a number or a scalar.
    """
    largest = xp.power_of_two(xp.max(abs(last)) * longer**0.5)
    return xp.where(largest > 0, 1 / largest, xp.like(1.0, largest))
