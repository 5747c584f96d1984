"""What several gradients send together."""

from collections.abc import Sequence

import tensorflow as tf

from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.tensorflow.quantization import Number, quantized_mean
from horovod_powersgd.tensorflow.workers import Workers


class Message:
    """The tensors of several senders, in one tensor.

    Args:
        parts: each sender's tensors, flat.

    Attributes:
        traffic: in bytes, int64, once it is exchanged.
    """

    def __init__(self, parts: Sequence[Sequence[tf.Tensor]]):
        self._parts = parts
        self._flat = [part for of_one in parts for part in of_one]

    def averaged(self, workers: Workers, name: str) -> list[list[tf.Tensor]]:
        """The averages of tensors of one dtype, each flat."""
        packed = _joined(self._flat)
        self.traffic = Traffic(nbytes(packed), nbytes(packed))
        return self._by_sender(_split(workers.mean(packed, name), self._flat, 0))

    def gathered(self, workers: Workers, name: str) -> list[list[tf.Tensor]]:
        """All workers' tensors, which have the same sizes on all of them, each (W, size)."""
        as_bytes = [_to_bytes(part) for part in self._flat]
        packed = _joined(as_bytes)
        everyones = workers.gather(packed, name)
        self.traffic = Traffic(nbytes(packed), nbytes(everyones))
        parts = _split(everyones, as_bytes, 1)
        return self._by_sender([_from_bytes(part, sent.dtype) for part, sent in zip(parts, self._flat)])

    def averaged_in_8_bits(
        self, rows: Sequence[tuple[Number, Number]], workers: Workers, name: str
    ) -> list[list[tf.Tensor]]:
        """The averages of matrices of one dtype, and this worker's parts of them, each flat.

        Args:
            rows: of the senders' matrices, in their order.
            workers: that average.
            name: of the message.
        """
        mean, own, self.traffic = quantized_mean(_joined(self._flat), rows, workers, name)
        return [list(both) for both in zip(*(_split(part, self._flat, 0) for part in (mean, own)))]

    def _by_sender(self, answers: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
        remaining = iter(answers)
        return [[next(remaining) for _ in of_one] for of_one in self._parts]


def nbytes(tensor: tf.Tensor) -> tf.Tensor:
    """Of a tensor's content, int64."""
    return tf.size(tensor, tf.int64) * tensor.dtype.size


def _joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat(tensors, 0) if len(tensors) > 1 else tensors[0]


def _split(tensor: tf.Tensor, like: Sequence[tf.Tensor], axis: int) -> Sequence[tf.Tensor]:
    if len(like) == 1:
        return [tensor]
    return tf.split(tensor, [part.shape[0] if part.shape[0] is not None else tf.size(part) for part in like], axis)


def _to_bytes(tensor: tf.Tensor) -> tf.Tensor:
    """Of a flat tensor, flat."""
    if tensor.dtype == tf.bool:
        return tf.cast(tensor, tf.uint8)
    return tf.reshape(tf.bitcast(tensor, tf.uint8), [-1])


def _from_bytes(packed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """(W, bytes) to (W, size)."""
    if dtype == tf.bool:
        return tf.cast(packed, tf.bool)
    if dtype.size == 1:
        return tf.bitcast(packed, dtype)
    return tf.bitcast(tf.reshape(packed, [tf.shape(packed)[0], -1, dtype.size]), dtype)
