"""Gradients that travel whole."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.collectives import AllreduceMean
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
