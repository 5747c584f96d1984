"""An orthonormal basis of a factor's columns."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from horovod_powersgd.factors import DEPENDENT


def orthogonalize(matrix: tf.Tensor, spare: Callable[[], tf.Tensor]) -> tf.Tensor:
    """factors.orthogonalize, by Householder QR in double precision, which is exact whatever the matrix's condition.

    Where a column depends on those before it, QR goes on with an arbitrary direction, and what follows is judged by
    that: then Gram-Schmidt does the work. It is rare.

    Args:
        matrix: (n, r), r <= n, float32 or float64; finite.
        spare: gives (n, r) float64 random numbers.

    Returns:
        (n, r) with orthonormal columns, of the matrix's dtype.
    """
    columns = tf.cast(matrix, tf.float64)
    columns /= tf.maximum(tf.reduce_max(tf.abs(columns)), np.finfo(np.float64).tiny)
    q, r = tf.linalg.qr(columns)
    smallest = DEPENDENT * np.finfo(matrix.dtype.as_numpy_dtype).eps * tf.reduce_max(tf.norm(columns, axis=0))
    dependent = tf.reduce_any(tf.abs(tf.linalg.diag_part(r)) <= smallest)
    basis = tf.cond(dependent, lambda: _gram_schmidt(columns, spare(), smallest), lambda: q)
    basis.set_shape(matrix.shape)
    return tf.cast(basis, matrix.dtype)


def _gram_schmidt(columns: tf.Tensor, spare: tf.Tensor, smallest: tf.Tensor) -> tf.Tensor:
    """Column by column; one with a part of its own no longer than `smallest` gives its place to a spare one."""
    count = tf.shape(columns)[1]

    def add_column(i, basis):
        column = _reject(columns[:, i], basis)
        column = tf.cond(tf.norm(column) <= smallest, lambda: _reject(spare[:, i], basis), lambda: column)
        return i + 1, basis + (column / tf.norm(column))[:, None] * tf.one_hot(i, count, dtype=basis.dtype)

    basis = tf.zeros_like(columns)
    shapes = tf.TensorShape(()), tf.TensorShape((None, None))
    return tf.while_loop(lambda i, _: i < count, add_column, (0, basis), shapes)[1]


def _reject(column: tf.Tensor, basis: tf.Tensor) -> tf.Tensor:
    """The part of the column that is orthogonal to the basis; twice, because once loses digits."""
    for _ in range(2):
        column -= tf.linalg.matvec(basis, tf.linalg.matvec(basis, column, transpose_a=True))
    return column
