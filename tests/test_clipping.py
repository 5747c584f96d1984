"""What becomes of the memory of a step that was clipped."""

import pytest

from horovod_powersgd.clipping import SPIKE, after_clipping


def run(factors):
    usual, kept = None, []
    for factor in factors:
        weight, usual = after_clipping(factor, usual)
        kept.append(weight)
    return kept, usual


def test_a_training_that_is_never_clipped_keeps_its_memory():
    assert run([1.0] * 5) == ([1.0] * 5, 1.0)


def test_a_training_that_is_clipped_in_every_step_keeps_its_memory():
    kept, usual = run([0.3, 0.25, 0.4, 0.3, 0.35] * 4)
    assert set(kept) == {1.0} and 0.25 < usual < 0.4


def test_a_spike_counts_as_the_part_of_a_step_that_its_update_is_and_nothing_after_it():
    kept, usual = run([0.5, 0.5, 0.5, 0.0005, 0.5, 0.5, 0.5])
    assert kept[3] == pytest.approx(0.001)
    assert kept[:3] + kept[4:] == [1.0] * 6
    assert usual == pytest.approx(0.5, rel=0.1)


def test_what_is_usual_follows_a_loss_scale_that_changes():
    kept, usual = run([2.0**-16] * 3 + [2.0**-17] * 8 + [2.0**-15] * 8)
    assert set(kept) == {1.0} and usual == pytest.approx(2.0**-15, rel=0.1)


def test_a_step_whose_update_is_thrown_away_does_not_count():
    kept, usual = run([1.0, 0.0, 1.0])
    assert kept == [1.0, 0.0, 1.0] and usual >= 1 / SPIKE
