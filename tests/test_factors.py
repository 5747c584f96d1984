"""Factors against plain linear algebra: the reference and the frameworks share these functions, so that no comparison
between them would find a fault here."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from horovod_powersgd.factors import DEPENDENT, initial_factor, orthogonalize, resized

DTYPES = st.sampled_from([np.float32, np.float64])
# (n, r), r <= n
SHAPES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 9))))


def random(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def projection(matrix):
    """Onto the space of its columns, which are independent."""
    basis = np.linalg.qr(matrix.astype(np.float64))[0]
    return basis @ basis.T


def refuse():
    raise AssertionError("nothing was dependent")


@given(SHAPES, DTYPES, st.integers(-30, 30))
def test_a_basis_is_orthonormal_and_of_the_columns_space(shape, dtype, exponent):
    matrix = (random(0, *shape) * 10.0**exponent).astype(dtype)
    basis = orthogonalize(matrix, refuse)
    assert basis.shape == shape and basis.dtype == dtype
    rounding = 100 * np.finfo(dtype).eps * np.linalg.cond(matrix.astype(np.float64))
    assert np.abs(basis.T.astype(np.float64) @ basis - np.eye(shape[1])).max() < 100 * np.finfo(dtype).eps
    assert np.abs(basis.astype(np.float64) @ basis.T - projection(matrix)).max() < rounding


@given(SHAPES, DTYPES)
def test_the_first_columns_make_the_basis_of_their_own_space(shape, dtype):
    matrix = random(1, *shape).astype(dtype)
    basis, qr = orthogonalize(matrix, refuse), np.linalg.qr(matrix.astype(np.float64))[0]
    # Those of a QR decomposition, but for their signs.
    rounding = 100 * np.finfo(dtype).eps * np.linalg.cond(matrix.astype(np.float64))
    assert np.abs(np.abs(np.sum(basis * qr, axis=0)) - 1).max() < rounding


@given(SHAPES, DTYPES, st.data())
def test_dependent_columns_give_their_places_to_spare_ones(shape, dtype, data):
    rank = data.draw(st.integers(0, shape[1]))
    matrix = np.zeros(shape)
    if rank:
        matrix = np.tile(random(2, shape[0], rank), 9)[:, : shape[1]]
    spare = random(3, *shape)
    basis = orthogonalize(matrix.astype(dtype), spare)
    assert (basis == orthogonalize(matrix.astype(dtype), lambda: spare)).all()
    whole = np.concatenate([matrix[:, :rank], spare[:, rank:]], axis=1)
    rounding = 1000 * np.finfo(dtype).eps * np.linalg.cond(whole)
    assert np.abs(basis.T.astype(np.float64) @ basis - np.eye(shape[1])).max() < 100 * np.finfo(dtype).eps
    assert np.abs(basis.astype(np.float64) @ basis.T - projection(whole)).max() < rounding


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("times, is_dependent", [(0.5, True), (2, False)])
def test_what_counts_as_dependent(dtype, times, is_dependent):
    own = times * DEPENDENT * np.finfo(dtype).eps
    matrix = np.array([[1, 1], [0, own], [0, 0]], dtype)
    basis = orthogonalize(matrix, np.array([[0, 0], [0, 0], [0, 1.0]]))
    assert np.allclose(np.abs(basis[:, 1]), [0, 0, 1] if is_dependent else [0, 1, 0])


@given(SHAPES, DTYPES, st.data())
def test_a_smaller_factor_keeps_the_largest_directions(shape, dtype, data):
    rank = data.draw(st.integers(1, shape[1]))
    left, right = np.linalg.qr(random(4, *shape))[0], np.linalg.qr(random(5, shape[1], shape[1]))[0]
    factor = (left * 0.5 ** np.arange(shape[1]) @ right.T).astype(dtype)
    small = factor if rank == shape[1] else resized(factor, rank, random(6, shape[0], rank))
    assert small.shape == (shape[0], rank) and small.dtype == dtype
    # The best approximation of that rank (Eckart and Young) is the projection onto the space of what is kept.
    u, values, vt = np.linalg.svd(factor.astype(np.float64))
    best = u[:, :rank] * values[:rank] @ vt[:rank]
    found = projection(small) @ factor.astype(np.float64)
    assert np.abs(found - best).max() < 1000 * np.finfo(dtype).eps * 2.0 ** shape[1]
    assert np.isclose(np.linalg.norm(small), np.linalg.norm(values[:rank]), rtol=1e-4)


@given(SHAPES, DTYPES, st.integers(1, 5), st.booleans())
def test_a_larger_factor_is_the_old_one_and_fresh_columns_of_its_length(shape, dtype, more, is_zero):
    factor = np.zeros(shape, dtype) if is_zero else random(7, *shape).astype(dtype)
    fresh = random(8, shape[0], shape[1] + more)
    large = resized(factor, shape[1] + more, fresh)
    assert large.shape == fresh.shape and large.dtype == dtype
    assert (large[:, : shape[1]] == factor).all()
    added, drawn = large[:, shape[1] :], fresh[:, shape[1] :]
    mean = np.sqrt(np.mean(np.sum(factor.astype(np.float64) ** 2, axis=0)))
    lengths = np.linalg.norm(drawn, axis=0) if is_zero else mean
    assert np.allclose(np.linalg.norm(added, axis=0), lengths, rtol=1e-5)
    cosines = np.sum(added * drawn, axis=0) / np.linalg.norm(added, axis=0) / np.linalg.norm(drawn, axis=0)
    assert np.allclose(cosines, 1, rtol=1e-5)


def test_a_start_is_of_the_seed_and_of_the_last_part_of_the_name():
    start = initial_factor("layers.0/weight", 300, 4, seed=3)
    assert start.shape == (300, 4) and start.dtype == np.float64
    for same in ("weight", "module.weight", "dense_7/weight"):
        assert (initial_factor(same, 300, 4, seed=3) == start).all()
    assert not np.isclose(initial_factor("bias", 300, 4, seed=3), start).any()
    assert not np.isclose(initial_factor("weight", 300, 4, seed=4), start).any()
    # Independent standard normal numbers: the Gram matrix is near 300 times the identity.
    assert np.abs(start.T @ start / 300 - np.eye(4)).max() < 0.3 and abs(start.mean()) < 0.1
