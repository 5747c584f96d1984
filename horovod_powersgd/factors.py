"""Factors in plain numpy: where they start, their orthonormal bases, and factors of another rank.

What every framework computes alike, or computes here where it is rare: tests hold these functions to plain linear
algebra, since the reference uses them, too.
"""

import re
from collections.abc import Callable

import numpy as np

# A column counts as dependent on those before it where what it has of its own is no longer than this many roundings of
# the longest column: DEPENDENT * eps * |longest|.
DEPENDENT = 128


def initial_factor(name: str, columns: int, rank: int, seed: int) -> np.ndarray:
    """The Q that every worker, in every framework, starts from. What is drawn later is from random_factor.

    Args:
        name: of the tensor. Only what comes after the last dot or slash counts: the rest changes with what a model is
            put into (module., _orig_mod.) and with how many layers Keras has counted.
        columns: m of its n x m matrix.
        rank: r.
        seed: PowerSGD.seed.

    Returns:
        (columns, rank) float64, independent standard normal entries.
    """
    last = re.split("[./]", name)[-1]
    return np.random.default_rng([seed, 0, *last.encode()]).standard_normal((columns, rank))


def orthogonalize(matrix: np.ndarray, spare: np.ndarray | Callable[[], np.ndarray]) -> np.ndarray:
    """An orthonormal basis of the matrix's columns, by Gram-Schmidt in double precision.

    A column that depends on those before it, up to rounding, gives its place to the spare column, so that a factor
    of zeros or of low rank still makes a whole basis.

    Args:
        matrix: (n, r), r <= n, finite, float32 or float64.
        spare: (n, r) random numbers, or a function that gives them, called where a column is dependent.

    Returns:
        (n, r) of the matrix's dtype.
    """
    columns = matrix.astype(np.float64)
    columns /= np.abs(columns).max() or 1.0
    smallest = DEPENDENT * np.finfo(matrix.dtype).eps * np.linalg.norm(columns, axis=0).max()
    basis = np.empty(matrix.shape)
    for i in range(matrix.shape[1]):
        column = _reject(columns[:, i], basis[:, :i])
        if np.linalg.norm(column) <= smallest:
            spare = spare() if callable(spare) else spare
            column = _reject(spare[:, i], basis[:, :i])
        basis[:, i] = column / np.linalg.norm(column)
    return basis.astype(matrix.dtype)


def _reject(column: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The part of the column that is orthogonal to the basis; twice, because once loses digits."""
    for _ in range(2):
        column = column - basis @ (basis.T @ column)
    return column


def resized(factor: np.ndarray, rank: int, fresh: np.ndarray) -> np.ndarray:
    """A factor of another rank, for Accordion.

    Args:
        factor: (n, R).
        rank: r. Where it is smaller, the r directions stay in which the factor is largest, which are those of delta;
            where it is larger, fresh columns are added.
        fresh: (n, r) random; its last columns are added, as long as the factor's on average.

    Returns:
        (n, r) of the factor's dtype.
    """
    columns = factor.shape[1]
    if rank < columns:
        wide = factor.astype(np.float64)
        return (wide @ np.linalg.eigh(wide.T @ wide)[1][:, columns - rank :]).astype(factor.dtype)
    added = fresh[:, columns:]
    length = np.linalg.norm(factor.astype(np.float64)) / np.sqrt(columns)
    if length > 0:
        added = added * (length / np.linalg.norm(added, axis=0))
    return np.concatenate([factor, added.astype(factor.dtype)], axis=1)
