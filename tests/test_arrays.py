"""The operations that compressors are written in: PyTorch's do what numpy's do."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import horovod_powersgd.torch.arrays as torch_arrays
from horovod_powersgd import arrays, randomness


def equal(found, expected):
    found = found.numpy() if torch.is_tensor(found) else np.asarray(found)
    assert found.dtype == np.asarray(expected).dtype and found.shape == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


X = np.random.default_rng(0).standard_normal((6, 8))
FLAT = X.ravel()
PLACES = np.array([[3, 1, 7], [7, 0, 1]])


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("reshape", (X, (-1,))),
        ("transpose", (X,)),
        ("concat", ([FLAT, FLAT[:3]],)),
        ("cast", (X, "float16")),
        ("cast", (X * 1e6, "float16")),
        ("cast", (X > 0, "float64")),
        ("like", (X > 0, X.astype("float32"))),
        ("arange", (5,)),
        ("shift_right", (np.arange(100), 3)),
        ("where", (X > 0, X, -X)),
        ("sign", (X,)),
        ("max", (X,)),
        *(("power_of_two", (np.array(x, "float32"),)) for x in (0, 1e-41, 0.7, 8, 3e38)),
        ("power_of_two", (np.array(0.7),)),
        ("sqrt", (abs(X),)),
        ("log", (abs(X),)),
        ("cos", (X,)),
        ("sum", (X,)),
        ("sum", (X, 0)),
        ("mean", (X, 1)),
        ("cumsum", (FLAT,)),
        ("all", (X < 9,)),
        ("take", (X, np.array([4, 0]))),
        ("scatter", (9, PLACES, X[:2, :3])),
        ("scatter", (9, PLACES[0], X[0, :3])),
        ("pack_bits", (FLAT[:37] > 0,)),
        ("unpack_bits", (np.packbits(X > 0, axis=1), 5)),
    ],
)
def test_torch_does_as_numpy(name, arguments):
    def to_torch(argument):
        if isinstance(argument, list):
            return list(map(to_torch, argument))
        return torch.from_numpy(argument) if isinstance(argument, np.ndarray) else argument

    equal(getattr(torch_arrays, name)(*map(to_torch, arguments)), getattr(arrays, name)(*arguments))


def test_decompositions():
    for xp, matrix in ((arrays, X), (torch_arrays, torch.from_numpy(X))):
        u, values, vt = xp.svd(matrix)
        equal((u * values) @ vt, X)
        assert (values[:-1] >= values[1:]).all()
        vectors = xp.eigh(xp.transpose(matrix) @ matrix)
        diagonal = np.diag(np.asarray(xp.transpose(vectors) @ (xp.transpose(matrix) @ matrix) @ vectors))
        assert (diagonal[:-1] <= diagonal[1:] + 1e-9).all()
        places = np.asarray(xp.top_k(abs(xp.reshape(matrix, (-1,))), 5))
        assert places.dtype == np.int64 and set(places) == set(np.argsort(abs(FLAT))[-5:])


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 1000))
def test_subsets_are_of_different_numbers_and_the_same_everywhere(size, part, step):
    count = max(1, int(part * size))
    subset = randomness.subset(arrays, 77, step, size, count)
    assert len(set(subset.tolist())) == count and subset.min() >= 0 and subset.max() < size
    equal(randomness.subset(torch_arrays, 77, step, size, count), subset)


def test_subsets_are_fair():
    counts, together = np.zeros(40), np.zeros((40, 40))
    for step in range(8000):
        subset = randomness.subset(arrays, 5, step, 40, 4)
        counts[subset] += 1
        together[np.ix_(subset, subset)] += 1
    # 800 each, with a standard deviation of 27; pairs 8000 * 4 * 3 / 40 / 39 = 62, with 8.
    assert abs(counts - 800).max() < 5 * 27
    pairs = together[~np.eye(40, dtype=bool)]
    assert abs(pairs - 61.5).max() < 5.5 * 8 and abs(pairs.std() - 7.8) < 1


def test_normal_numbers_are_normal_independent_and_the_same_everywhere():
    numbers = randomness.normal(arrays, 123, 4, np.arange(100_000))
    assert abs(numbers.mean()) < 0.015 and abs(numbers.std() - 1) < 0.01 and abs((numbers**4).mean() - 3) < 0.1
    for other in (np.roll(numbers, 1), randomness.normal(arrays, 123, 5, np.arange(100_000))):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.015
    equal(randomness.normal(torch_arrays, 123, 4, torch.arange(100_000)), numbers)


def test_the_power_of_two_below_a_number():
    for number, below in ((1.0, 1.0), (5.0, 4.0), (0.3, 0.25), (3e38, 2.0**127), (0.0, 0.0)):
        assert arrays.power_of_two(np.float32(number)) == below
