"""Gradients that travel whole."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.collectives import AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.quantization import rows_of


@dataclass(frozen=True)
class NoCompression(Compressor):
    """Averages every gradient as it is, as Horovod's Compression.none does, with this package's statistics.

    Linear: one allreduce of n m numbers.
    """

    error_feedback = False
    linear = True

    def obstacle(self, rows: int, columns: int) -> str | None:
        return "NoCompression"


@dataclass(frozen=True)
class Float16(Compressor):
    """Averages matrices in half precision, as Horovod's Compression.fp16 does, but keeps what rounding loses.

    Linear: one allreduce of n m numbers of two bytes. A number that is too large for half precision makes the step fail
    on all workers, as one that is not finite does.

    Args:
        error_feedback: add what one step's rounding left out to the next step's gradient. Without it scalars and
            vectors travel in half precision, too, as with Horovod's.

    Raises:
        TypeError: error_feedback is neither True nor False.
    """

    error_feedback: bool = True
    linear = True

    def __post_init__(self) -> None:
        self._check_bool("error_feedback")

    @property
    def takes_vectors(self) -> bool:  # type: ignore[override]  # which others say once for all
        return not self.error_feedback

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp = state.arrays
        own = xp.cast(delta, "float16")
        mean = yield AllreduceMean(own)
        return xp.like(mean, delta), xp.like(own, delta)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return rows * columns * 2


# What Horovod's own do, Compression.none and Compression.fp16.
HOROVODS_NONE, HOROVODS_FP16 = NoCompression(), Float16(error_feedback=False)


def is_horovods_fp16(compressor: Compressor) -> bool:
    """Whether it is Float16 without error feedback: what Horovod's Compression.fp16 does."""
    return isinstance(compressor, Float16) and not compressor.error_feedback


@dataclass(frozen=True)
class Int8(Compressor):
    """Averages matrices in 8 bits a number, for models that no low rank suits; keeps what rounding loses.

    Not linear: up to three workers gather each other's bytes; where there are more, each averages a slice
    (horovod_powersgd.quantization). n m bytes, and a number for each block.

    Args:
        block: so many numbers, in the order of the matrix's rows, are divided by the largest of them. Smaller: more
            accurate, more bytes.
        error_feedback: add what one step's rounding left out to the next step's gradient.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: block is below 1.
    """

    block: int = 256
    error_feedback: bool = True
    linear = False

    def __post_init__(self) -> None:
        self._check_integer("block", at_least=1)
        self._check_bool("error_feedback")

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        flat = state.arrays.reshape(delta, (state.shape[0] * state.shape[1],))
        mean, own = yield QuantizedMean(flat, self.block)
        return mean, own

    def quantized_rows(self, rows: int, columns: int, step: int = 0) -> list[list[int]]:
        return [[length for count, length in rows_of([rows * columns], self.block) for _ in range(count)]]

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        (blocks,) = self.quantized_rows(rows, columns)
        return sum(blocks) + len(blocks) * itemsize
