"""Averages in 8 bits a number, as ops in a graph: horovod_powersgd.quantization, of tensors."""

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from horovod_powersgd import quantization
from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.quantization import LEVELS
from horovod_powersgd.tensorflow.graph_function import graph_function
from horovod_powersgd.tensorflow.senders import Senders
from horovod_powersgd.tensorflow.workers import Number

# Where numbers are is a constant in the graph for so many of a message at most: 8 MiB. Of more it is found out in each
# step.
MOST_KNOWN = 2**20


_inlined = functools.partial(graph_function, inlined=True)


class Slices:
    """quantization.Slices, and the messages that they travel in: for each slice its units and then its codes.

    Args:
        rows: for each matrix, how many there are, and how long they are.
        senders: how many average them.
        dtype: of the numbers.

    Attributes:
        size: of each slice, in numbers.
        segment_of: (slices, size) int64: which of all slices' segments each number is in.
        width: how many segments a slice has, int64.
    """

    def __init__(self, rows: Sequence[tuple[Number, Number]], senders: Number, dtype: tf.DType):
        self._dtype = dtype
        counts, lengths = zip(*rows)
        if all(isinstance(number, int) for number in (senders, *counts, *lengths)):
            slices = quantization.Slices(np.repeat(lengths, counts), quantization.slice_count(senders))
            self.size, width = slices.size, slices.segments.shape[1]
            self.width = tf.constant(width, tf.int64)
            if slices.size * len(slices.segments) <= MOST_KNOWN:
                segment_of = np.repeat(np.arange(slices.segments.size), slices.segments.reshape(-1))
                self.segment_of = tf.constant(segment_of.reshape(-1, slices.size), tf.int64)
            else:
                self.segment_of = _segment_of(tf.constant(slices.segments), tf.constant(slices.size, tf.int64))
        else:
            of_each, long = (tf.stack([tf.cast(n, tf.int64) for n in numbers]) for numbers in (counts, lengths))
            many = tf.cast(senders, tf.int64)
            self.segment_of, self.width = _cut(of_each, long, tf.where(many >= quantization.TWO_ROUNDS, many, 1))
            self.size = tf.shape(self.segment_of, tf.int64)[1]

    def encoded(self, numbers: tf.Tensor, index: tf.Tensor | None = None) -> tf.Tensor:
        """The messages (slices, bytes) of all slices, or of the one with this index, of these numbers, flat; what is
        missing at the end is zeros."""
        return _encoded(numbers, self._of(index), self.width)

    def decoded(self, messages: tf.Tensor, index: tf.Tensor | None = None) -> tf.Tensor:
        """The numbers, flat, that the messages (slices, bytes) hold: of all slices, or of the one with this index."""
        return _decoded(messages, self._of(index), self.width, self._dtype.name)

    def summed(self, messages: tf.Tensor, index: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The mean of what all senders' messages (count, bytes) say of one slice, in the senders' order."""
        return _summed(messages, self._of(index), self.width, count, self._dtype.name)

    def _of(self, index: tf.Tensor | None) -> tf.Tensor:
        """segment_of, of all slices, or of one among its own."""
        return self.segment_of if index is None else self.segment_of[index : index + 1] - index * self.width


@_inlined
def _encoded(numbers, segment_of, width):
    dtype, (count, size) = numbers.dtype, tf.unstack(tf.shape(segment_of, tf.int64))
    numbers = tf.pad(numbers, [[0, count * size - tf.size(numbers, tf.int64)]])
    segment_of = tf.reshape(segment_of, [-1])
    largest = tf.math.unsorted_segment_max(abs(numbers), segment_of, count * width)
    infinite = tf.cast(~tf.math.is_finite(numbers), dtype)
    infinite = tf.math.unsorted_segment_max(infinite, segment_of, count * width) > 0
    # Of an empty segment, the largest is the least number there is.
    units = tf.maximum(largest, 0) / LEVELS
    units = tf.where(infinite, tf.constant(np.nan, dtype), units)
    each = tf.gather(units, segment_of)
    counted = each >= np.finfo(dtype.as_numpy_dtype).tiny
    codes = tf.where(counted, tf.round(numbers / tf.where(counted, each, 1)), 0)
    codes = tf.bitcast(tf.cast(codes, tf.int8), tf.uint8)
    units = tf.bitcast(tf.reshape(units, [count, width]), tf.uint8)
    parts = [tf.reshape(part, [count, -1]) for part in (units, codes)]
    return tf.concat(parts, 1)


@_inlined
def _decoded(messages, segment_of, width, dtype: str):
    return _numbers(messages, segment_of, width, dtype, 1)


@_inlined
def _summed(messages, segment_of, width, count, dtype: str):
    def add(sender, total):
        return sender + 1, total + _numbers(messages[sender : sender + 1], segment_of, width, dtype, count)

    zeros = tf.zeros([tf.shape(segment_of)[1]], dtype)
    return tf.while_loop(lambda sender, _: sender < count, add, [tf.constant(0, tf.int64), zeros])[1]


def _numbers(messages, segment_of, width, dtype: str, divisor):
    """What messages say, over a divisor."""
    itemsize = tf.as_dtype(dtype).size
    units = tf.bitcast(tf.reshape(messages[:, : width * itemsize], [-1, itemsize]), dtype) / tf.cast(divisor, dtype)
    codes = tf.reshape(tf.bitcast(messages[:, width * itemsize :], tf.int8), [-1])
    return tf.cast(codes, dtype) * tf.gather(units, tf.reshape(segment_of, [-1]))


@graph_function
def _segment_of(segments, size):
    """Slices.segment_of."""
    found = tf.repeat(tf.range(tf.size(segments, tf.int64)), tf.reshape(segments, [-1]))
    return tf.reshape(found, tf.stack([-1, size]))


@graph_function
def _cut(counts, lengths, count):
    """Slices.segment_of and width of so many slices, where the rows are not known before the graph runs."""
    size = -(-tf.reduce_sum(counts * lengths) // count)
    ends = tf.concat([tf.cumsum(tf.repeat(lengths, counts)), size * tf.range(1, count + 1)], 0)
    ends = tf.unique(tf.sort(ends))[0]
    # Those of all slices, from the first on; and each slice's own.
    segment_of = tf.searchsorted(ends, tf.range(count * size), "right", tf.int64)
    segment_of = tf.reshape(segment_of, [count, size])
    segment_of -= segment_of[:, :1]
    width = tf.reduce_max(segment_of) + 1
    return segment_of + width * tf.range(count)[:, None], width


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
    with tf.control_dependencies([flat]):  # not before, while that takes memory
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
