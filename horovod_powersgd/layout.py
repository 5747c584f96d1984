"""How a tensor is seen as a matrix, and whether it is compressed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What one tensor is to a compressor.

    Attributes:
        shape: of the tensor.
        matrix_shape: (rows, columns) that the tensor is seen as; None for scalars and vectors, unless the compressor
            takes them, too: as one row.
        amount: how much of it is sent: the columns of its factors, or the number of its entries; 0 where it is not
            compressed, or the compressor leaves no choice.
        reason: why it is not compressed; None if it is.
    """

    shape: tuple[int, ...]
    matrix_shape: tuple[int, int] | None
    amount: int
    reason: str | None

    @property
    def compressed(self) -> bool:
        """Whether the tensor travels compressed."""
        return self.reason is None

    @property
    def matrix(self) -> tuple[int, int]:
        """matrix_shape of a tensor that has one, as all that are compressed do."""
        assert self.matrix_shape is not None
        return self.matrix_shape


def leading_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) where the first axis holds the outputs, as in PyTorch: (out, in * height * width)."""
    return shape[0], math.prod(shape[1:])


def trailing_columns(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) where the last axis holds the outputs, as in TensorFlow: (height * width * in, out)."""
    return math.prod(shape[:-1]), shape[-1]


def layout_of(shape: Sequence[int], compressor, matrix_shape=leading_rows) -> Layout:
    """Decides how a tensor of this shape is exchanged.

    Args:
        shape: of the tensor.
        compressor: a Compressor.
        matrix_shape: a function from the shape of a tensor with two axes or more to (rows, columns).
    """
    shape = tuple(int(side) for side in shape)
    if len(shape) < 2 and not compressor.takes_vectors:
        return Layout(shape, None, 0, "a scalar" if not shape else "a vector")
    rows, columns = matrix_shape(shape) if len(shape) > 1 else (1, math.prod(shape))
    obstacle = "empty" if rows * columns == 0 else compressor.obstacle(rows, columns)
    return Layout(shape, (rows, columns), 0 if obstacle else compressor.amount(rows, columns), obstacle)
