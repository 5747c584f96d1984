"""What a compressor's generator knows of the matrix that it exchanges."""

from collections.abc import Callable
from typing import Any


class MatrixState:
    """One matrix in one step.

    Attributes:
        name: of the tensor.
        arrays: the operations of the framework (horovod_powersgd.arrays, or what has its functions).
        shape: (n, m), of the matrix.
        step: how many steps were exchanged before.
        amount: Compressor.amount of the matrix, as it is in this step.
        key: what its shared random numbers are drawn from (horovod_powersgd.randomness).
        worker: this one's number.
        workers: how many there are.
        finite: whether this worker's gradient is. Where it is not, delta is zeros, and of what the worker sends, floats
            become NaN, which makes the step fail on all workers.

    In a graph of TensorFlow, all but arrays and shape are tensors.
    """

    def __init__(
        self,
        arrays,
        name: str,
        shape: tuple[int, int],
        key: int,
        kept: dict[str, Any],
        to_array: Callable = lambda x: x,
    ):
        self.arrays, self.name, self.shape, self.key = arrays, name, shape, key
        # What was put into it is there in the next step, if this one is finite.
        self.kept = dict(kept)
        self._to_array = to_array

    def begin(self, step, amount, worker, workers, finite) -> "MatrixState":
        """Takes what is new in a step."""
        self.step, self.amount, self.worker, self.workers, self.finite = step, amount, worker, workers, finite
        return self

    def get(self, key: str, initial):
        """What was last put there: the same on every worker. At first `initial`, a numpy array."""
        return self.kept[key] if key in self.kept else self._to_array(initial)

    def put(self, key: str, value) -> None:
        """Keeps an array for the next step. It must be the same on every worker, as means are; what is a worker's own
        belongs into the memory. Its shape and dtype must not change."""
        self.kept[key] = value
