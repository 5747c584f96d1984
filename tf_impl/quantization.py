"""Averages in 8 bits a number, as ops in a graph: horovod_powersgd.quantization, of tensors."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from horovod_powersgd import quantization
from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.quantization import LEVELS
from horovod_powersgd.tensorflow.senders import Senders
from horovod_powersgd.tensorflow.workers import Number


class Slices:
    """quantization.Slices, and the messages that they travel in: for each slice its units and then its codes.

    Args:
        rows: for each matrix, how many there are, and how long they are.
        senders: how many average them.
        dtype: of the numbers.
    """

    def __init__(self, rows: Sequence[tuple[Number, Number]], senders: Number, dtype: tf.DType):
        self._dtype = dtype
        counts, lengths = zip(*rows)
        if all(isinstance(number, int) for number in (senders, *counts, *lengths)):
            slices = quantization.Slices(np.repeat(lengths, counts), quantization.slice_count(senders))
            self._segments, self.size = slices.segments, slices.size
        else:
            of_each, long = (tf.stack([tf.cast(n, tf.int64) for n in numbers]) for numbers in (counts, lengths))
            self._segments, self.size = _cut(of_each, long, tf.cast(senders, tf.int64))
        self.count, self._width = tf.unstack(tf.shape(self._segments, tf.int64))

    def encoded(self, numbers: tf.Tensor, index: tf.Tensor | None = None) -> tf.Tensor:
        """The messages (slices, bytes) of all slices, or of the one with this index, of these numbers, flat; what is
        missing at the end is zeros."""
        segments, count = self._of(index)
        numbers = tf.pad(numbers, [[0, count * self.size - tf.size(numbers, tf.int64)]])
        segment_of = tf.repeat(tf.range(count * self._width), tf.reshape(segments, [-1]))
        largest = tf.math.unsorted_segment_max(abs(numbers), segment_of, count * self._width)
        infinite = tf.cast(~tf.math.is_finite(numbers), self._dtype)
        infinite = tf.math.unsorted_segment_max(infinite, segment_of, count * self._width) > 0
        # Of an empty segment, the largest is the least number there is.
        units = tf.maximum(largest, 0) / LEVELS
        units = tf.where(infinite, tf.constant(np.nan, self._dtype), units)
        each = tf.gather(units, segment_of)
        counted = each >= np.finfo(self._dtype.as_numpy_dtype).tiny
        codes = tf.where(counted, tf.round(numbers / tf.where(counted, each, 1)), 0)
        codes = tf.bitcast(tf.cast(codes, tf.int8), tf.uint8)
        units = tf.bitcast(tf.reshape(units, [count, self._width]), tf.uint8)
        parts = [tf.reshape(part, [count, -1]) for part in (units, codes)]
        return tf.concat(parts, 1)

    def decoded(self, messages: tf.Tensor, index: tf.Tensor | None = None, divisor: tf.Tensor | int = 1) -> tf.Tensor:
        """The numbers, flat, over a divisor, that the messages (slices, bytes) hold: of all slices, or of the one with
        this index."""
        segments, count = self._of(index)
        itemsize = self._dtype.size
        units = tf.reshape(messages[:, : self._width * itemsize], [-1, itemsize])
        units = tf.bitcast(units, self._dtype) / tf.cast(divisor, self._dtype)
        codes = tf.reshape(tf.bitcast(messages[:, self._width * itemsize :], tf.int8), [-1])
        return tf.cast(codes, self._dtype) * tf.repeat(units, tf.reshape(segments, [-1]))

    def summed(self, messages: tf.Tensor, index: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The mean of what all senders' messages (count, bytes) say of one slice, in the senders' order."""

        def add(sender, total):
            return sender + 1, total + self.decoded(messages[sender : sender + 1], index, count)

        zeros = tf.zeros([self.size], self._dtype)
        return tf.while_loop(lambda sender, _: sender < count, add, [tf.constant(0, tf.int64), zeros])[1]

    def _of(self, index: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        if index is None:
            return tf.convert_to_tensor(self._segments), self.count
        return tf.convert_to_tensor(self._segments)[index : index + 1], tf.constant(1, tf.int64)


def _cut(counts: tf.Tensor, lengths: tf.Tensor, senders: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The segments and the size of quantization.Slices, where the rows are not known before the graph runs."""
    count = tf.where(senders >= quantization.TWO_ROUNDS, senders, 1)
    size = -(-tf.reduce_sum(counts * lengths) // count)
    ends = tf.concat([tf.cumsum(tf.repeat(lengths, counts)), size * tf.range(1, count + 1)], 0)
    ends = tf.unique(tf.sort(ends))[0]
    slice_of = (ends - 1) // size
    in_slices = tf.math.unsorted_segment_sum(tf.ones_like(ends), slice_of, count)
    places = tf.range(tf.size(ends, tf.int64)) - tf.gather(tf.cumsum(in_slices, exclusive=True), slice_of)
    found = ends - tf.concat([[0], ends[:-1]], 0)
    return tf.scatter_nd(tf.stack([slice_of, places], 1), found, [count, tf.reduce_max(in_slices)]), size


def quantized_mean(
    flat: tf.Tensor, rows: Sequence[tuple[Number, Number]], senders: Senders, name: str
) -> tuple[tf.Tensor, tf.Tensor, Traffic]:
    """quantization.mean of this sender's rows and the others'.

    Args:
        flat: the rows, one after the other.
        rows: as Slices'.
        senders: that average.
        name: of the messages.

    Returns:
        The mean and this sender's part of it, both flat, and what was sent.
    """
    count = senders.count
    slices, total = Slices(rows, count, flat.dtype), tf.size(flat, tf.int64)
    message = slices.encoded(flat)
    own = slices.decoded(message)
    if senders.workers.single:
        return own[:total], own[:total], Traffic(0, 0)
    many = tf.cast(count, tf.int64)

    def one_round():
        messages, traffic = senders.gather(message[0], f"{name}.gather")
        return slices.summed(messages, tf.constant(0, tf.int64), many), own, traffic

    def two_rounds():
        index = senders.number()
        messages, first = senders.exchange(message, f"{name}.alltoall")
        mine = slices.summed(messages, index, many)
        messages, second = senders.gather(slices.encoded(mine, index)[0], f"{name}.rounded")
        mean = slices.decoded(messages)
        start = index * slices.size
        changed = (mean[start : start + slices.size] - mine) * tf.cast(many, flat.dtype)
        corrected = own + tf.pad(changed, [[start, tf.size(own, tf.int64) - start - slices.size]])
        return mean, corrected, Traffic(*map(sum, zip(first, second)))

    if isinstance(count, int):
        mean, own, traffic = (two_rounds if count >= quantization.TWO_ROUNDS else one_round)()
    else:
        mean, own, traffic = tf.cond(count >= quantization.TWO_ROUNDS, two_rounds, one_round)
    return mean[:total], own[:total], traffic
