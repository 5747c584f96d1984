"""Memories in 16 bits a number."""

import runpy

import numpy as np
import pytest

from environments import REPOSITORY
from horovod_powersgd import PowerSGD, arrays, checkpoint, reference, rounding

MEASURED = runpy.run_path(str(REPOSITORY / "benchmarks" / "memory_rounding.py"))


@pytest.mark.parametrize("dtype, bits", [("bfloat16", 7), ("float16", 10)])
def test_a_number_becomes_one_of_its_neighbours_and_on_average_itself(dtype, bits):
    rows, columns = rounding.of_rows_and_columns(arrays, 5, 60, 50)
    unit = 2.0**-bits
    for number in (1 + 0.3 * unit, -1 - 0.9 * unit, 1 + unit, 0):
        memory, total = np.full((60, 50), number, np.float32), 0
        for step in range(100):
            of_step = np.int32(rounding.of_step(arrays, step, 2))
            found = rounding.rounded(arrays, memory, dtype, rows + of_step, columns)
            assert found.dtype == np.float32 and (abs(found - number) < unit).all()
            total = total + found.astype(np.float64)
        # Of 300,000 draws, and of 100 for each number.
        assert abs(total.mean() / 100 - number) < 0.005 * unit
        assert abs(total / 100 - number).max() < 0.25 * unit


def test_other_steps_and_workers_draw_anew():
    drawn = {int(rounding.of_step(arrays, step, worker)) for step in range(10) for worker in range(10)}
    assert len(drawn) > 95


@pytest.mark.parametrize("dtype", rounding.BITS_CUT_OFF)
def test_what_is_smaller_than_the_memorys_last_bit_adds_up(dtype):
    rows, columns = rounding.of_rows_and_columns(arrays, 5, 30, 20)
    drawn = by_nearest = np.ones((30, 20), np.float32)
    small = np.float32(1e-4)
    for step in range(2000):
        of_step = np.int32(rounding.of_step(arrays, step, 0))
        drawn = rounding.rounded(arrays, drawn + small, dtype, rows + of_step, columns)
        by_nearest = MEASURED["nearest"](by_nearest + small, dtype)
    assert abs(drawn.mean() - 1.2) < 0.002
    assert (by_nearest == 1).all()  # the test can tell


def test_a_state_loads_whatever_the_memorys_dtype():
    states = [reference.State()]
    configs = [PowerSGD(rank=2, memory_dtype=dtype) for dtype in (None, "bfloat16")]
    for saving, loading in (configs, configs[::-1]):
        saved = checkpoint.state_dict(saving, 1, 0, 3, {"w": {"shape": [9, 9], "memory": states}})
        assert checkpoint.share_of(saved, loading, {"w": (9, 9)}, 1, 0).memories == {"w": [saved["tensors"]["w"]]}
