"""horovod_powersgd.arrays, for TensorFlow's tensors. Where a graph is built, counts and conditions can be tensors."""

import functools
import sys

import tensorflow as tf

from horovod_powersgd.tensorflow import orthogonalization
from horovod_powersgd.tensorflow.graph_function import graph_function


def reshape(x, shape):
    return tf.reshape(x, shape)


def transpose(x):
    return tf.transpose(x)


def concat(parts):
    return tf.concat(parts, 0)


def cast(x, dtype):
    # To half precision by way of float32, as processors do it.
    return tf.cast(tf.cast(x, tf.float32) if dtype == "float16" else x, dtype)


def like(x, other):
    return tf.cast(x, other.dtype)


def integers(x):
    return tf.cast(x, tf.int64)


def arange(count):
    return tf.range(count, dtype=tf.int64)


def shift_right(x, bits):
    return tf.bitwise.right_shift(x, tf.cast(bits, x.dtype))


def where(condition, x, y):
    dtype = next((part.dtype for part in (x, y) if tf.is_tensor(part)), None)
    return tf.where(condition, tf.convert_to_tensor(x, dtype), tf.convert_to_tensor(y, dtype))


def sign(x):
    return tf.sign(x)


def max(x):
    return tf.reduce_max(x)


def power_of_two(x):
    integer, exponent = (tf.int64, 0x7FF << 52) if x.dtype == tf.float64 else (tf.int32, 0xFF << 23)
    return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(x, integer), tf.constant(exponent, integer)), x.dtype)


def bits(x):
    return tf.bitcast(x, tf.int32)


def floats(x):
    return tf.bitcast(x, tf.float32)


def sqrt(x):
    return tf.sqrt(x)


def log(x):
    return tf.math.log(x)


def cos(x):
    return tf.cos(x)


def sum(x, axis=None):
    return tf.reduce_sum(x, axis)


def mean(x, axis=None):
    return tf.reduce_mean(x, axis)


def cumsum(x):
    return tf.cumsum(x)


def all(x):
    return tf.reduce_all(x)


def top_k(x, k):
    return tf.cast(tf.math.top_k(x, k, sorted=False).indices, tf.int64)


def take(x, places):
    return tf.gather(x, places)


def scatter(size, places, values):
    return tf.scatter_nd(tf.reshape(places, (-1, 1)), tf.reshape(values, (-1,)), tf.constant([size], places.dtype))


def pack_bits(bits):
    padded = tf.pad(tf.cast(bits, tf.float32), [[0, tf.math.floormod(-tf.size(bits), 8)]])
    values = tf.constant([128, 64, 32, 16, 8, 4, 2, 1], tf.float32)
    return tf.cast(tf.linalg.matvec(tf.reshape(padded, (-1, 8)), values), tf.uint8)


def unpack_bits(packed, count):
    bits = tf.bitwise.right_shift(packed[..., None], tf.constant([7, 6, 5, 4, 3, 2, 1, 0], tf.uint8)) & 1
    leading = tf.shape(packed)[:-1]
    return tf.cast(tf.reshape(bits, tf.concat([leading, [-1]], 0))[..., :count], tf.bool)


def svd(matrix):
    values, u, v = tf.linalg.svd(matrix)
    return u, values, tf.transpose(v)


def eigh(matrix):
    return tf.linalg.eigh(matrix)[1]


def orthogonalize(matrix, spare):
    """horovod_powersgd.factors.orthogonalize; `spare` is a function."""
    return orthogonalization.orthogonalize(matrix, spare)


def cond(condition, yes, no):
    return tf.cond(tf.convert_to_tensor(condition), yes, no)


def apart(function, *integers):
    """function(arrays, *integers), of int64, as a function of its own in the graph: built once, whoever calls it."""
    return _built(function)(*(tf.cast(x, tf.int64) for x in integers))


@functools.cache
def _built(function):
    return graph_function(functools.partial(function, sys.modules[__name__]))


def until(done, change, x):
    return tf.while_loop(lambda x: tf.logical_not(done(x)), lambda x: [change(x)], [x])[0]
