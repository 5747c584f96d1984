"""What several gradients send together."""

from collections.abc import Sequence

import tensorflow as tf

from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.hosts import Host
from horovod_powersgd.tensorflow.finite import all_finite
from horovod_powersgd.tensorflow.host_mean import HostMean
from horovod_powersgd.tensorflow.quantization import quantized_mean
from horovod_powersgd.tensorflow.senders import Senders
from horovod_powersgd.tensorflow.workers import Number, Workers


class Message:
    """The tensors of several senders, in one tensor.

    Args:
        parts: each sender's tensors, flat.

    Attributes:
        traffic: in bytes, integers or int64, once it is exchanged.
        finite: whether an average over all workers is; the same on every worker. None of other messages.
    """

    finite: tf.Tensor | None = None

    def __init__(self, parts: Sequence[Sequence[tf.Tensor]]):
        self._parts = parts
        self._flat = [part for of_one in parts for part in of_one]

    def averaged(self, workers: Workers, name: str) -> list[list[tf.Tensor]]:
        """The averages of tensors of one dtype, each flat."""
        packed = _joined(self._flat)
        mean = workers.mean(packed, name)
        self.traffic, self.finite = Traffic(nbytes(packed), nbytes(packed)), all_finite([mean])
        return self._by_sender(_split(mean, self._flat, 0))

    def gathered(self, workers: Workers, name: str) -> list[list[tf.Tensor]]:
        """All workers' tensors, which have the same sizes on all of them, each (W, size)."""
        as_bytes = [_to_bytes(part) for part in self._flat]
        packed = _joined(as_bytes)
        everyones = workers.gather(packed, name)
        self.traffic = Traffic(nbytes(packed), nbytes(everyones))
        parts = _split(everyones, as_bytes, 1)
        return self._by_sender([_from_bytes(part, sent.dtype) for part, sent in zip(parts, self._flat)])

    def averaged_in_8_bits(
        self, rows: Sequence[tuple[Number, Number]], senders: Senders, name: str
    ) -> list[list[tf.Tensor]]:
        """The averages of matrices of one dtype, and this sender's parts of them, each flat.

        Args:
            rows: of the matrices, in their order.
            senders: that average.
            name: of the message.
        """
        mean, own, self.traffic = quantized_mean(_joined(self._flat), rows, senders, name)
        self.finite = all_finite([mean])
        return [list(both) for both in zip(*(_split(part, self._flat, 0) for part in (mean, own)))]

    def averaged_in_host(
        self, requests: Sequence[HostMean], host: Host, workers: Workers, name: str
    ) -> list[list[tf.Tensor]]:
        """The averages of tensors of one dtype over the workers of a host, each flat. Nothing leaves the host.

        Args:
            requests: for the senders' tensors, in their order.
            host: this worker's, of tensors.
            workers: that exchange.
            name: of the message.
        """
        self.traffic = Traffic(0, 0)
        if workers.alone:
            return self._by_sender(self._flat)
        share = host.share

        def sizes(place):
            return [request.numbers_of(share, place)[1] for request in requests]

        def add(place, messages):
            numbers = [request.numbers_of(share, place) for request in requests]
            found = [part[first : first + size] for part, (first, size) in zip(self._flat, numbers)]
            return place + 1, messages.write(tf.cast(place, tf.int32), _joined(found))

        def exchanged():
            dtype, count = self._flat[0].dtype, tf.cast(share.parts, tf.int32)
            messages = tf.TensorArray(dtype, count, infer_shape=False, element_shape=[None])
            start = tf.constant(0, tf.int64), messages
            messages = tf.while_loop(lambda place, _: place < share.parts, add, start)[1]
            places = tf.range(share.parts)
            to_each = tf.zeros_like(places) + sum(sizes(places))
            received = workers.exchange(messages.concat(), host.peers, to_each, name)
            mean = tf.reduce_mean(tf.reshape(received, tf.stack([share.parts, -1])), 0)
            return tf.split(mean, sizes(share.place))

        return self._by_sender(tf.cond(share.parts > 1, exchanged, lambda: self._flat))

    def _by_sender(self, answers: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
        remaining = iter(answers)
        return [[next(remaining) for _ in of_one] for of_one in self._parts]


def nbytes(tensor: tf.Tensor) -> Number:
    """Of a tensor's content: an integer, or int64."""
    numbers = tensor.shape.num_elements()
    return (tf.size(tensor, tf.int64) if numbers is None else numbers) * tensor.dtype.size


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
