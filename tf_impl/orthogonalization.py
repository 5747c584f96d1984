"""An orthonormal basis of a factor's columns."""

import functools

import numpy as np
import tensorflow as tf

from horovod_powersgd.randomness import SPARE, random_factor
from horovod_powersgd.reference import DEPENDENT
from horovod_powersgd.tensorflow import arrays


def orthogonalize(factor: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """reference.orthogonalize, by Householder QR in double precision, which is exact whatever the factor's condition.

    Where a row depends on those before it, QR goes on with an arbitrary direction, and what follows is judged against
    that: then Gram-Schmidt does the work. It is rare.

    Args:
        factor: (r, n), r <= n, float32 or float64: a factor, transposed; finite.
        key: of the tensor's state; it chooses the spare columns.

    Returns:
        (r, n) with orthonormal rows, of the factor's dtype.
    """
    basis = _function(factor.dtype)(factor, key)
    basis.set_shape(factor.shape)
    return basis


@functools.cache
def _function(dtype: tf.DType):
    """Traced once and not inlined: a model's graph holds only the calls."""
    arguments = tf.TensorSpec((None, None), dtype), tf.TensorSpec((), tf.int64)
    return tf.function(
        _orthogonalize, input_signature=arguments, autograph=False, experimental_attributes={"_noinline": True}
    )


def _orthogonalize(factor, key):
    columns = tf.cast(tf.transpose(factor), tf.float64)
    columns /= tf.maximum(tf.reduce_max(tf.abs(columns)), np.finfo(np.float64).tiny)
    q, r = tf.linalg.qr(columns)
    smallest = DEPENDENT * np.finfo(factor.dtype.as_numpy_dtype).eps * tf.reduce_max(tf.norm(columns, axis=0))
    dependent = tf.reduce_any(tf.abs(tf.linalg.diag_part(r)) <= smallest)
    basis = tf.cond(dependent, lambda: _gram_schmidt(columns, key, smallest), lambda: q)
    return tf.cast(tf.transpose(basis), factor.dtype)


def _gram_schmidt(columns: tf.Tensor, key: tf.Tensor, smallest: tf.Tensor) -> tf.Tensor:
    """Column by column; one with a part of its own no larger than `smallest` gives its place to a random column."""
    rows, count = tf.unstack(tf.shape(columns))
    spare = random_factor(arrays, key, SPARE, rows, count)

    def add_column(i, basis):
        column = _reject(columns[:, i], basis)
        column = tf.cond(tf.norm(column) <= smallest, lambda: _reject(spare[:, i], basis), lambda: column)
        return i + 1, basis + (column / tf.norm(column))[:, None] * tf.one_hot(i, count, dtype=basis.dtype)

    basis = tf.zeros_like(columns)
    return tf.while_loop(lambda i, _: i < count, add_column, (0, basis), (tf.TensorShape(()), basis.shape))[1]


def _reject(column: tf.Tensor, basis: tf.Tensor) -> tf.Tensor:
    """The part of the column that is orthogonal to the basis; twice, because once loses digits."""
    for _ in range(2):
        column -= tf.linalg.matvec(basis, tf.linalg.matvec(basis, column, transpose_a=True))
    return column
