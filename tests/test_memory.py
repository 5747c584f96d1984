"""Error-feedback memory over a long job. benchmarks/memory_growth.py draws the same, larger."""

import runpy

import numpy as np
import pytest

from environments import REPOSITORY

GROWTH = runpy.run_path(str(REPOSITORY / "benchmarks" / "memory_growth.py"))


def norms(rule, scenario, steps):
    """Each worker's |e_w| after each step, (steps, workers)."""
    run = GROWTH["gradients"](scenario, steps, shape=(32, 24))
    return np.array([GROWTH["norms"](matrices) for matrices in GROWTH["memories"](rule, run)])


def growth(norms, early, late):
    """For each worker, how many times larger its memory is late in the run than early, on average over these steps."""
    return norms[late].mean(axis=0) / norms[early].mean(axis=0)


def test_memory_is_no_larger_after_5000_steps_than_after_300():
    early, late = slice(300, 600), slice(2500, None)
    local = norms("local", "noise", 5000)
    assert (growth(local, early, late) < 1.05).all()
    # Nor are there peaks.
    assert (local[late].max(axis=0) < 1.15 * local[early].max(axis=0)).all()
    # The test can tell: the rule of other implementations fails it by far.
    assert (growth(norms("averaged", "noise", 3000), early, late) > 2).all()


def test_memory_stays_bounded_where_the_data_of_workers_differ():
    early, late = slice(300, 500), slice(900, None)
    assert (growth(norms("local", "offset", 1200), early, late) < 1.25).all()
    assert (growth(norms("averaged", "offset", 1200), early, late) > 2).all()


@pytest.mark.parametrize("scenario", GROWTH["SCENARIOS"])
def test_the_rules_send_the_same_and_differ_in_what_each_worker_keeps(scenario):
    runs = (GROWTH["memories"](rule, GROWTH["gradients"](scenario, 10)) for rule in ("local", "averaged"))
    for local, averaged in zip(*runs):
        np.testing.assert_allclose(local.mean(axis=0), averaged.mean(axis=0), atol=1e-9)
    assert (GROWTH["norms"](local) < GROWTH["norms"](averaged)).all()
