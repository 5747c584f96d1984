"""Averages in 8 bits, against their definition, number by number."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from horovod_powersgd import Int8, PowerSGD, quantization
from horovod_powersgd.quantization import TWO_ROUNDS, Slices, mean, slice_count
from horovod_powersgd.reference import State, simulate

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
DTYPES = st.sampled_from(["float32", "float64"])


def rows_of(seed, lengths, dtype="float64"):
    """Rows of different sizes, one after the other."""
    rng = np.random.default_rng(seed)
    return np.concatenate([10.0 ** rng.integers(-3, 4) * rng.standard_normal(n) for n in lengths]).astype(dtype)


def rounded(row):
    """By the definition."""
    unit = row.dtype.type(max(abs(row)) / row.dtype.type(127))
    return [row.dtype.type(round(float(number / unit)) * unit) if unit else row.dtype.type(0) for number in row]


@given(st.integers(1, TWO_ROUNDS - 1), LENGTHS, DTYPES)
def test_one_round_is_the_mean_of_what_each_worker_rounds(workers, lengths, dtype):
    everyones = [rows_of([worker, len(lengths)], lengths, dtype) for worker in range(workers)]
    found, parts = mean(everyones, lengths)
    ends = np.cumsum(lengths)
    for numbers, part in zip(everyones, parts):
        expected = np.concatenate([rounded(row) for row in np.split(numbers, ends[:-1])])
        np.testing.assert_array_equal(part, expected)
    assert found.dtype == dtype
    off = abs(found - np.mean(parts, axis=0, dtype="float64"))
    assert (off <= 4 * np.finfo(dtype).eps * np.mean(np.abs(parts), axis=0)).all()


@given(st.integers(TWO_ROUNDS, 12), LENGTHS)
def test_two_rounds_lose_nothing_of_the_mean(workers, lengths):
    everyones = [rows_of([worker, len(lengths)], lengths) for worker in range(workers)]
    found, parts = mean(everyones, lengths)
    largest = np.max(np.abs(everyones))
    np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=0, atol=1e-13 * largest)
    # Each rounding by half a unit at most, of a part of the row and of the part of the mean.
    for place, length in zip(np.cumsum(lengths) - lengths, lengths):
        row = np.array(everyones)[:, place : place + length]
        off = abs(found[place : place + length] - row.mean(axis=0)).max()
        assert off <= 1.01 * (abs(row).max(axis=1).mean() + abs(row.mean(axis=0)).max() + 1 / 127) / 127


@given(LENGTHS, st.integers(1, 20))
def test_slices_are_equal_and_hold_all_rows(lengths, count):
    slices = Slices(lengths, count)
    assert (slices.segments.sum(axis=1) == slices.size).all()
    assert sum(lengths) <= slices.count * slices.size < sum(lengths) + slices.count
    ends = set(np.cumsum(slices.segments))
    assert ends >= set(np.cumsum(lengths)) and ends >= set(slices.size * np.arange(1, slices.count + 1))


def test_what_is_sent_is_counted():
    assert [slice_count(workers) for workers in (1, TWO_ROUNDS - 1, TWO_ROUNDS, 9)] == [1, 1, TWO_ROUNDS, 9]
    # Four rows of 100 numbers and a unit each; then, of four slices, each with one row.
    assert quantization.traffic([100] * 4, 2, 4) == (416, 832)
    assert quantization.traffic([100] * 4, 3, 4) == (416, 1248)
    assert quantization.traffic([100] * 4, 4, 4) == (4 * 104 + 104, 4 * 104 + 4 * 104)
    # Each of a host's three workers sends a third to each host: of two, and of four, in slices and then of the means.
    assert quantization.traffic([100] * 4, 6, 4, 3) == (2 * 139, 2 * 139)
    assert quantization.traffic([100] * 4, 12, 4, 3) == (2 * 4 * 35, 2 * 4 * 35)
    for workers in (2, 3):
        sent = PowerSGD(rank=2, wire_dtype="int8").traffic([(30, 20), (5,)], workers)
        assert sent.sent == PowerSGD(rank=2, wire_dtype="int8").message_bytes(30, 20, 4) + 20 == 2 * (30 + 20 + 8) + 20
        assert Int8(block=100).traffic([(30, 20)], workers).sent == Int8(block=100).message_bytes(30, 20, 4) == 624


@pytest.mark.parametrize("workers", [1, 2, 4, 9])
def test_rows_of_zeros_tiny_numbers_and_what_is_not_finite(workers):
    lengths = [6, 6, 6, 6]
    everyones = [np.zeros(24, "float32") for _ in range(workers)]
    for numbers in everyones:
        numbers[6:12] = 1e-41  # not normal numbers: they stay in the memory
        numbers[12:18] = 3e38
    everyones[-1][20] = np.inf
    found, parts = mean(everyones, lengths)
    assert (found[:12] == 0).all() and all((part[:12] == 0).all() for part in parts)
    np.testing.assert_allclose(found[12:18], 3e38, rtol=1e-6)
    assert np.isnan(found[20]) and not np.isnan(found[:18]).any()


@pytest.mark.parametrize("workers, per_host", [(1, 1), (2, 1), (3, 1), (5, 1), (9, 1), (6, 3), (8, 2)])
@pytest.mark.parametrize(
    "config",
    [
        PowerSGD(rank=3, wire_dtype="int8"),
        PowerSGD(rank=2, wire_dtype="int8", num_iters_per_step=1),
        Int8(block=64),
    ],
    ids=str,
)
def test_updates_and_the_mean_memory_sum_to_the_mean_gradients(config, workers, per_host):
    shapes = {"a": (40, 30), "b": (9, 70), "c": (24, 24)}
    states = [State() for _ in range(workers // per_host)]
    given_sum, update_sum = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
    for step in range(10):
        rng = np.random.default_rng(step)
        gradients = [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(workers)]
        updates = simulate(gradients, states, config, workers_per_host=per_host)
        for name in shapes:
            assert all((update[name] == updates[0][name]).all() for update in updates)
            given_sum[name] = given_sum[name] + np.mean([g[name] for g in gradients], axis=0)
            update_sum[name] = update_sum[name] + updates[0][name]
    for name in shapes:
        left = np.mean([state.memory[name] for state in states], axis=0)
        assert np.linalg.norm(left) > 0
        np.testing.assert_allclose(update_sum[name] + left, given_sum[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("half_steps", [1, 2, 3])
def test_half_precision_follows_gradients_of_any_size(half_steps):
    """Beyond 65504 from the first step on, 1,000 times as large from one to the next, and as much smaller."""
    config, states = PowerSGD(rank=2, wire_dtype="float16", num_iters_per_step=half_steps), [State(), State()]
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((40, 2)), rng.standard_normal((2, 300))
    for step, size in enumerate([1e6, 1e6, 1e9, 1e9, 1e6, 1e3, 1, 1e-3, 1e-6, 1e-6, 1e-3]):
        matrix = (size * u @ v).astype("float32")
        for state in states:
            state.memory.clear()  # what is left of larger gradients
        update = simulate([{"w": matrix}, {"w": matrix}], states, config)[0]["w"]
        assert states[0].steps == step + 1
        if step > 1:
            assert np.linalg.norm(update - matrix) <= 2**-8 * np.linalg.norm(matrix), (step, size)


def test_the_numbers_of_what_travels_in_8_bits():
    assert quantization.LEVELS == 127
    assert not PowerSGD(wire_dtype="int8").linear and PowerSGD(wire_dtype="float16").linear and not Int8().linear
    sent = PowerSGD(8, wire_dtype="int8").message_bytes(1000, 1000, 4)
    assert math.isclose(sent, PowerSGD(8).message_bytes(1000, 1000, 4) / 4, rel_tol=0.01)
