"""Vector quantization in a basis that is learnt from the gradients."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from horovod_powersgd.compressors.collectives import AllreduceMean
from horovod_powersgd.compressors.compressor import Compressor


@dataclass(frozen=True)
class GradiVeq(Compressor):
    """Sends slices of a matrix in the coordinates of their principal components (Yu et al., "GradiVeQ: Vector
    Quantization for Bandwidth-Efficient Gradient Aggregation in Distributed CNN Training", NeurIPS 2018, section 3).

    Steps take turns: in learning_steps the matrix is averaged as it is, and the means' slices of slice_size numbers,
    row after row, are added up as g g^T; the `dimensions` eigenvectors of that sum with the largest eigenvalues are the
    basis B of the compressed_steps that follow, in which B^T g is averaged and B B^T g arrives. Slices that reach
    beyond the end are filled up with zeros. A tensor that is new amid the compressed steps has no basis: nothing of it
    arrives, and its memory grows, until the next learning_steps.

    Linear: one allreduce of n m numbers, or of `dimensions` for each slice. The basis is not sent: each worker computes
    it from the same means, which gives the same bits where processors and libraries are the same.

    Args:
        slice_size: numbers in a slice, at least 2. A matrix of fewer than two slices is not compressed.
        dimensions: that a slice is sent in, at least 1 and below slice_size: by so much is less sent.
        learning_steps: at least 1.
        compressed_steps: at least 1.
        error_feedback: add what one step left out to the next step's gradient.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.
    """

    slice_size: int = 256
    dimensions: int = 16
    learning_steps: int = 10
    compressed_steps: int = 90
    error_feedback: bool = True
    linear = True

    def __post_init__(self) -> None:
        self._check_integer("slice_size", at_least=2)
        for field in ("dimensions", "learning_steps", "compressed_steps"):
            self._check_integer(field, at_least=1)
        self._check_bool("error_feedback")
        if self.dimensions >= self.slice_size:
            raise ValueError(
                f"GradiVeq: dimensions must be below slice_size, {self.slice_size}, not {self.dimensions!r}"
            )

    def obstacle(self, rows: int, columns: int) -> str | None:
        return None if rows * columns >= 2 * self.slice_size else f"has fewer than two slices of {self.slice_size}"

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, width = state.arrays, self.slice_size
        size = state.shape[0] * state.shape[1]
        place = state.step % (self.learning_steps + self.compressed_steps)
        learning = place < self.learning_steps
        basis = state.get("basis", np.zeros((width, self.dimensions)))
        products = state.get("products", np.zeros((width, width)))

        def slices(flat):
            return xp.reshape(xp.concat([flat, xp.like(np.zeros(-size % width), flat)]), (-1, width))

        def from_basis(coordinates):
            parts = xp.reshape(coordinates, (-1, self.dimensions)) @ xp.transpose(xp.like(basis, delta))
            return xp.reshape(parts, (-1,))[:size]

        flat = xp.reshape(delta, (-1,))
        own = xp.cond(
            learning, lambda: flat, lambda: xp.reshape(slices(flat) @ xp.like(basis, delta), (-1,))
        )
        mean = yield AllreduceMean(own)
        update = xp.cond(learning, lambda: mean, lambda: from_basis(mean))
        sent = xp.cond(learning, lambda: flat, lambda: from_basis(own))

        learnt = slices(xp.cast(update, "float64"))
        products = xp.cond(learning, lambda: products + xp.transpose(learnt) @ learnt, lambda: products * 0)
        # Not ==, which compares identities in the graphs of TensorFlow 1.
        last = learning & (place >= self.learning_steps - 1)
        state.put("basis", xp.cond(last, lambda: xp.eigh(products)[:, -self.dimensions :], lambda: basis))
        state.put("products", products)
        return update, sent

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        if step % (self.learning_steps + self.compressed_steps) < self.learning_steps:
            return rows * columns * itemsize
        return -(-rows * columns // self.slice_size) * self.dimensions * itemsize
