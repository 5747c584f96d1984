"""How a tensor is seen as a matrix, and whether it is compressed."""

import math
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

from horovod_powersgd.powersgd import PowerSGD


@dataclass(frozen=True)
class Layout:
    """What one tensor is to PowerSGD.

    Attributes:
        shape: of the tensor.
        matrix_shape: (rows, columns) that the tensor is seen as; None for scalars and vectors.
        rank: columns of its factors, the configured rank or the matrix's smaller side; 0 if it is not compressed.
        reason: why it is not compressed; None if it is.
    """

    shape: Tuple[int, ...]
    matrix_shape: Optional[Tuple[int, int]]
    rank: int
    reason: Optional[str]

    @property
    def compressed(self) -> bool:
        """Whether the tensor travels as factors."""
        return self.reason is None


def leading_rows(shape: Sequence[int]) -> Tuple[int, int]:
    """(rows, columns) where the first axis holds the outputs, as in PyTorch: (out, in * height * width)."""
    return shape[0], math.prod(shape[1:])


def trailing_columns(shape: Sequence[int]) -> Tuple[int, int]:
    """(rows, columns) where the last axis holds the outputs, as in TensorFlow: (height * width * in, out)."""
    return math.prod(shape[:-1]), shape[-1]


def layout_of(shape: Sequence[int], config: PowerSGD, matrix_shape=leading_rows) -> Layout:
    """Decides how a tensor of this shape is exchanged.

    Args:
        shape: of the tensor.
        config: the configuration; its rank and min_compression_rate decide.
        matrix_shape: a function from the shape of a tensor with two axes or more to (rows, columns).
    """
    shape = tuple(int(side) for side in shape)
    if len(shape) < 2:
        return Layout(shape, None, 0, "a scalar" if not shape else "a vector")
    rows, columns = matrix_shape(shape)
    if rows * columns == 0:
        return Layout(shape, (rows, columns), 0, "empty")
    rank = min(config.rank, rows, columns)
    rate = rows * columns / (rank * (rows + columns))
    if rate < config.min_compression_rate:
        reason = f"would shrink {rate:.2f} times, below min_compression_rate={config.min_compression_rate}"
        return Layout(shape, (rows, columns), 0, reason)
    return Layout(shape, (rows, columns), int(rank), None)
