"""The compressors' operations for TensorFlow's tensors equal those for numpy's arrays."""

import inspect

import numpy as np
import pytest

from horovod_powersgd import arrays, randomness

tf = pytest.importorskip("tensorflow")
from horovod_powersgd.tensorflow import arrays as tf_arrays  # noqa: E402  (where TensorFlow is)

rng = np.random.default_rng(0)
MATRIX = rng.standard_normal((6, 5)).astype("float32")
VECTOR = rng.standard_normal(21)
BITS = VECTOR > 0.2
PLACES = np.array([[3, 0, 7], [7, 7, 1]])

# Of the operations and what they are given; numbers become tensors, too, where `count` says that they are counts.
CALLS = {
    "reshape": lambda xp, x, count: xp.reshape(x(MATRIX), (count(3), -1)),
    "transpose": lambda xp, x, count: xp.transpose(x(MATRIX)),
    "concat": lambda xp, x, count: xp.concat([x(VECTOR), x(VECTOR[:3])]),
    "cast": lambda xp, x, count: xp.cast(x(np.float32([1e6, -2.5])), "float16"),
    "like": lambda xp, x, count: xp.like(count(3), x(MATRIX)) * x(MATRIX) + xp.like(np.ones(5), x(MATRIX)),
    "integers": lambda xp, x, count: xp.integers(x(np.int32([3, 4]))) + xp.integers(count(2)),
    "arange": lambda xp, x, count: xp.arange(count(7)),
    "shift_right": lambda xp, x, count: xp.shift_right(x(np.array([2**40 + 9, 64])), 3),
    "where": lambda xp, x, count: xp.where(x(PLACES) < 5, x(PLACES), 5) + xp.where(x(PLACES) < 1, 0, x(PLACES)),
    "sign": lambda xp, x, count: xp.sign(x(np.float32([-2, 0, 3]))),
    "max": lambda xp, x, count: xp.max(x(MATRIX)),
    "power_of_two": lambda xp, x, count: xp.power_of_two(x(np.float32(5))) + xp.cast(
        xp.power_of_two(x(np.float64(0.3))), "float32"
    ),
    "bits": lambda xp, x, count: xp.bits(x(np.float32([1e6, -2.5]))),
    "floats": lambda xp, x, count: xp.floats(x(np.int32([2**30, -(2**30)]))),
    "sqrt": lambda xp, x, count: xp.sqrt(abs(x(VECTOR))),
    "log": lambda xp, x, count: xp.log(abs(x(VECTOR))),
    "cos": lambda xp, x, count: xp.cos(x(VECTOR)),
    "sum": lambda xp, x, count: xp.sum(x(MATRIX), axis=1) + xp.sum(x(MATRIX)),
    "mean": lambda xp, x, count: xp.mean(x(MATRIX), axis=0) + xp.mean(x(MATRIX)),
    "cumsum": lambda xp, x, count: xp.cumsum(x(VECTOR)),
    "all": lambda xp, x, count: xp.all(x(VECTOR) > -9),
    # In any order.
    "top_k": lambda xp, x, count: xp.scatter(21, xp.top_k(x(VECTOR), count(4)), x(np.ones(4))),
    "take": lambda xp, x, count: xp.take(x(MATRIX), x(np.array([4, 0]))),
    "scatter": lambda xp, x, count: xp.scatter(9, x(PLACES), x(MATRIX[:2, :3])),
    "pack_bits": lambda xp, x, count: xp.pack_bits(x(BITS)),
    "unpack_bits": lambda xp, x, count: xp.unpack_bits(x(np.packbits([BITS, ~BITS], axis=-1)), 21),
    "svd": lambda xp, x, count: abs(xp.svd(x(MATRIX))[0]) * xp.svd(x(MATRIX))[1] @ abs(xp.svd(x(MATRIX))[2]),
    "eigh": lambda xp, x, count: abs(xp.eigh(x(MATRIX.T @ MATRIX))[:, -2:]),
    "cond": lambda xp, x, count: (lambda v: xp.cond(count(3) > 2, lambda: v[:3], lambda: v))(x(VECTOR)),
    "until": lambda xp, x, count: xp.until(
        lambda y: xp.all(y > 20), lambda y: xp.where(y > 20, y, 2 * y), xp.arange(count(9)) + 1
    ),
    "operators": lambda xp, x, count: ((x(PLACES) ^ 5) & 6) // 2 % 3,
}


def test_every_operation_is_there_and_is_tried():
    functions = {name for name, found in vars(arrays).items() if inspect.isfunction(found)}
    assert functions == CALLS.keys() - {"operators"}
    assert functions <= {name for name, found in vars(tf_arrays).items() if inspect.isfunction(found)}


def equal(call):
    expected = call(arrays, lambda array: array, lambda number: number)
    # Nothing is known of the arrays' sizes, nor of the counts, when the graph is built.
    given = {}

    def in_graph(**given):
        names = iter(sorted(given))
        take = lambda _: given[next(names)]  # noqa: E731
        return call(tf_arrays, take, take)

    def collect(value):
        value = tf.constant(value, tf.int64 if isinstance(value, int) else None)
        given[f"x{len(given):02}"] = value
        return value

    eager = call(tf_arrays, collect, collect)
    signature = {name: tf.TensorSpec([None] * value.shape.rank, value.dtype) for name, value in given.items()}
    graph = tf.function(in_graph, autograph=False).get_concrete_function(**signature)(**given)
    for found in (eager, graph):
        assert found.numpy().dtype == expected.dtype
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(found, expected, rtol=1e-5 if expected.dtype == "float32" else 1e-12, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_operations_equal_numpys(name):
    equal(CALLS[name])


@pytest.mark.parametrize("step", [0, 7])
def test_random_numbers_equal_numpys(step):
    key = randomness.key_of("layer/kernel", 3)
    for size, amount in ((1, 1), (10, 10), (1000, 37)):
        equal(lambda xp, x, count: randomness.subset(xp, count(key), count(step), size, count(amount)))
    equal(lambda xp, x, count: randomness.normal(xp, count(key), count(step), xp.arange(count(99))))
    equal(lambda xp, x, count: randomness.draw(xp, count(key), count(step), x(PLACES)))
    equal(lambda xp, x, count: randomness.random_factor(xp, count(key), count(step), count(30), count(4)))
