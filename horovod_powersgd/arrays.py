"""The operations that compressors are written in, for numpy arrays.

horovod_powersgd.torch.arrays and horovod_powersgd.tensorflow.arrays have the same functions for their tensors; beside
them, compressors use operators, slices and abs(). A scalar can be a Python number or, in TensorFlow, a tensor.
"""

from collections.abc import Callable

import numpy as np


def reshape(x, shape):
    """x in another shape; one side can be -1."""
    return np.reshape(x, shape)


def transpose(x):
    """Of a matrix."""
    return np.transpose(x)


def concat(parts):
    """The parts one after the other, along their first axis."""
    return np.concatenate(parts)


def cast(x, dtype: str):
    """x in the dtype of this name; float16 by way of float32, as processors do it. What is too large becomes
    infinite."""
    with np.errstate(over="ignore"):
        x = np.asarray(x)
        return (x.astype(np.float32) if dtype == "float16" else x).astype(dtype)


def like(x, other):
    """x, an array or a scalar, in the dtype of the other array."""
    return np.asarray(x).astype(other.dtype)


def integers(x):
    """x, a scalar or integers, as int64."""
    return np.asarray(x, np.int64)


def arange(count):
    """0 to count - 1, int64."""
    return np.arange(count, dtype=np.int64)


def shift_right(x, bits: int):
    """Of integers that are not negative."""
    return x >> bits


def where(condition, x, y):
    """x where the condition holds, y elsewhere."""
    return np.where(condition, x, y)


def sign(x):
    """-1, 0 or 1."""
    return np.sign(x)


def max(x):
    """Of all."""
    return np.max(x)


def power_of_two(x):
    """Of a scalar that is not negative: the largest power of two that is not above it; 0 below the normal numbers."""
    x = np.asarray(x)
    integer, exponent = (np.int64, 0x7FF << 52) if x.dtype == np.float64 else (np.int32, 0xFF << 23)
    return (x.view(integer) & integer(exponent)).view(x.dtype)


def bits(x):
    """Those of float32 numbers, as int32."""
    return x.view(np.int32)


def floats(x):
    """The float32 numbers that have these bits, int32."""
    return x.view(np.float32)


def sqrt(x):
    """The square root."""
    return np.sqrt(x)


def log(x):
    """The natural logarithm."""
    return np.log(x)


def cos(x):
    """The cosine."""
    return np.cos(x)


def sum(x, axis=None):
    """Along an axis, or of all."""
    return np.sum(x, axis=axis)


def mean(x, axis=None):
    """Along an axis, or of all."""
    return np.mean(x, axis=axis)


def cumsum(x):
    """Of a vector: what each element and those before it add up to."""
    return np.cumsum(x)


def all(x):
    """Whether all elements are true."""
    return np.all(x)


def top_k(x, k):
    """The places of the k largest elements of a vector, int64, in any order."""
    return np.argpartition(x, len(x) - k)[len(x) - k :].astype(np.int64)


def take(x, places):
    """The elements, or rows, of x at these places."""
    return x[places]


def scatter(size: int, places, values):
    """(size,): the sum of the values at each place; zero where there is none. Both can have several axes."""
    total = np.zeros(size, values.dtype)
    np.add.at(total, places.reshape(-1), values.reshape(-1))
    return total


def pack_bits(bits):
    """A vector of booleans as bytes, eight in each, the first as the highest bit; uint8."""
    return np.packbits(bits)


def unpack_bits(packed, count: int):
    """(..., bytes) from pack_bits to (..., count) booleans."""
    return np.unpackbits(packed, axis=-1, count=count).astype(bool)


def svd(matrix) -> tuple:
    """U (n, s), the singular values (s,), falling, and V^T (s, m) of a finite matrix (n, m); s = min(n, m)."""
    return np.linalg.svd(matrix, full_matrices=False)


def eigh(matrix):
    """The eigenvectors of a finite symmetric matrix, as columns, by rising eigenvalue."""
    return np.linalg.eigh(matrix)[1]


def cond(condition, yes: Callable, no: Callable):
    """yes() or no(): arrays of one dtype. In a graph of TensorFlow both are built."""
    return yes() if condition else no()


def until(done: Callable, change: Callable, x):
    """x after as many changes as it takes until it is done."""
    while not done(x):
        x = change(x)
    return x
