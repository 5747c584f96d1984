"""What an exchange of two levels asks of the workers of a host."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from horovod_powersgd.hosts import RowShare


@dataclass(frozen=True)
class HostMean:
    """The request to average a tensor over the workers of a host. It is answered with the mean, flat; or, of a matrix,
    with this worker's share of the mean's rows, if `row` says how long they are."""

    tensors: Any
    row: int | None = None

    def numbers_of(self, share: RowShare, place: tf.Tensor) -> tuple[Any, Any]:
        """The first of the numbers that one of the workers gets, and how many they are; once the tensor is flat, in a
        list."""
        (flat,) = self.tensors
        if self.row is None:
            return 0, tf.size(flat, tf.int64)
        first, count = share.rows(flat.shape[0] // self.row, place)
        return first * self.row, count * self.row
