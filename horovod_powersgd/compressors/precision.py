"""Gradients that travel whole."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.collectives import AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor


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
        error_feedback: add what one step's rounding left out to the next step's gradient.

    Raises:
        TypeError: error_feedback is neither True nor False.
    """

    error_feedback: bool = True
    linear = True

    def __post_init__(self) -> None:
        self._check_bool("error_feedback")

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp = state.arrays
        own = xp.cast(delta, "float16")
        mean = yield AllreduceMean(own)
        return xp.like(mean, delta), xp.like(own, delta)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return rows * columns * 2


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
    bits = 8

    def __post_init__(self) -> None:
        self._check_integer("block", at_least=1)
        self._check_bool("error_feedback")

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, numbers = state.arrays, state.shape[0] * state.shape[1]
        block = min(self.block, numbers)
        flat, missing = xp.reshape(delta, (numbers,)), -numbers % block
        if missing:
            flat = xp.concat([flat, 0 * flat[:missing]])
        mean, own = yield QuantizedMean(xp.reshape(flat, (-1, block)), self.bits)
        mean, own = xp.reshape(mean, (-1,)), xp.reshape(own, (-1,))
        return (mean[:numbers], own[:numbers]) if missing else (mean, own)

    def quantized_rows(self, rows: int, columns: int, step: int = 0) -> list[list[int]]:
        block = min(self.block, rows * columns)
        return [[block] * -(-rows * columns // block)]

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        (blocks,) = self.quantized_rows(rows, columns)
        return sum(blocks) + len(blocks) * itemsize
