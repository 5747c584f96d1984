"""Auto's decisions, on links and processors that are made up."""

from typing import NamedTuple

import pytest

from horovod_powersgd import Accordion, Auto, Float16, NoCompression, PowerSGD
from horovod_powersgd.choosing import (
    AGAIN_STEPS,
    CALM_SECONDS,
    CHANGE,
    CLOSE,
    CYCLE,
    ENOUGH_STEPS,
    FEW,
    LEAST_STEPS,
    MOST_STEPS,
    ODD_SECONDS,
    PERIOD,
    Choice,
    Chooser,
)
from horovod_powersgd.cost import Work, predict, predict_plain
from horovod_powersgd.layout import layout_of, leading_rows
from horovod_powersgd.network import Curve, Network

SHAPES = {"large": (2000, 1000), "small": (40, 40), "vector": (1000,)}
AUTO = Auto(PowerSGD(rank=4), Float16(error_feedback=False))
# In which all candidates are tried, however short their steps are.
TRIES = 7 * MOST_STEPS


class Job(NamedTuple):
    """A job whose true times are like those that a calibration finds, or not."""

    network: Network
    backward: float = 0.0
    works: tuple[Work, ...] = (Work(1e-3, 1e-9), Work(1e-5, 5e-10))
    lie: float = 1.0  # how many times longer compressed steps take than is predicted

    def calibrate(self):
        return self.network, self.works

    def step(self, choice):
        shapes = list(SHAPES.values())
        if choice.number is None:
            return predict_plain(shapes, self.network).step(self.backward)
        if choice.number == 1:
            return predict_plain(shapes, self.network, self.works[1]).step(self.backward)
        plain = [i for i, name in enumerate(SHAPES) if name in choice.plain]
        prediction = predict(shapes, AUTO.candidates[0], self.network, self.works[0], leading_rows, plain)
        return self.lie * prediction.step(self.backward)


def link(bytes_per_second, latency=1e-3):
    curve = Curve(((0, latency), (1e9, latency + 1e9 / bytes_per_second)))
    return Network(2, curve, curve, curve, curve)


def run(chooser, job, steps):
    """What was chosen for each step."""
    chosen, times = [], []
    for _ in range(steps):
        chosen.append(chooser.choice)
        times.append(job.step(chooser.choice))
        if len(times) >= chooser.interval:
            chooser.report(sorted(times)[len(times) // 2], job.calibrate)
            times = []
    return chosen


def chooser():
    return Chooser(AUTO, SHAPES, leading_rows)


def test_a_slow_link_gets_factors():
    found = chooser()
    chosen = run(found, Job(link(1e7)), TRIES)
    assert chosen[0] == Choice() and chosen[-1].number == 0
    # What is too small for its passes to pay travels as it is.
    assert chosen[-1].plain == {"small"}
    assert found.measured[chosen[-1]] == pytest.approx(found.predicted[chosen[-1]])


def test_a_fast_link_gets_gradients_as_they_are_and_nothing_else_is_tried():
    assert set(run(chooser(), Job(link(1e11)), TRIES)) == {Choice()}


def test_a_wrong_prediction_costs_some_steps_only():
    job = Job(link(1e7), lie=200.0)
    chosen = run(chooser(), job, TRIES)
    assert chosen[-1].number == 1  # what is second best
    assert sum(choice.number == 0 for choice in chosen) <= MOST_STEPS


def test_a_disturbed_step_of_two_does_not_count():
    found, job = chooser(), Job(link(1e6))
    for seconds in (9.0, job.step(Choice()), 7 * job.step(Choice())):
        assert found.choice == Choice()
        found.report(seconds, job.calibrate)
    assert found.measured == {Choice(): pytest.approx(job.step(Choice()))}


def test_what_is_much_slower_is_soon_given_up():
    job = Job(link(5e8), lie=2.5)
    chosen = run(chooser(), job, TRIES)
    assert chosen[-1].number == 1
    assert sum(choice.number == 0 for choice in chosen) == ENOUGH_STEPS


def test_what_is_hardly_faster_is_not_taken():
    # Nearly all of a step is backward.
    assert run(chooser(), Job(link(1e7), backward=60.0), TRIES)[-1] == Choice()


def test_it_looks_again_when_the_link_has_changed():
    found = chooser()
    run(found, Job(link(1e11)), TRIES)
    assert found.choice == Choice() and found.interval == PERIOD
    slow = Job(link(1e7))
    assert slow.step(Choice()) > CHANGE * found.measured[Choice()]
    chosen = run(found, slow, PERIOD + FEW + TRIES)
    assert chosen[PERIOD] == Choice()  # once may be a disturbance
    assert chosen[PERIOD + FEW].number == 0 and chosen[-1].number == 0


def test_a_short_disturbance_is_no_change():
    found, calibrated = Chooser(AUTO, SHAPES, leading_rows, period=10), []
    run(found, Job(link(1e11)), TRIES)
    slow = 4 * found.measured[Choice()]
    for _ in range(int(ODD_SECONDS / slow / 10)):
        found.report(slow, calibrated.append)
    assert found._odd > 2 and not calibrated
    found.report(found.measured[Choice()], calibrated.append)
    assert found._odd == found._odd_seconds == 0


def test_steps_that_take_turns_are_looked_at_again_less_and_less_often():
    found, seconds, looks = chooser(), 0.0, []
    short, long = (Job(link(1e7), backward=backward) for backward in (0.02, 0.1))

    def train(until, job_at):
        nonlocal seconds
        steps = 0
        while seconds < until:
            job = job_at(seconds)

            def calibrate(job=job):
                looks.append(seconds)
                return job.calibrate()

            step = job.step(found.choice)
            seconds, steps = seconds + step, steps + 1
            if steps >= found.interval:
                found.report(step, calibrate)
                steps = 0

    train(120, lambda at: long if int(at / 3) % 2 else short)
    assert 4 < len(looks) <= 14, len(looks)
    train(120 + 2 * CALM_SECONDS, lambda at: short)
    count, changed, two_reports = len(looks), seconds, found.interval + FEW
    # After a calm time a change is noticed as soon as the first one.
    train(seconds + 20, lambda at: long)
    assert len(looks) == count + 1 and looks[-1] <= changed + two_reports * long.step(found.choice)


def test_comparisons_come_after_as_many_steps_as_are_asked_for():
    found = Chooser(AUTO, SHAPES, leading_rows, period=20)
    run(found, Job(link(1e11)), TRIES)
    assert found.interval == 20


def test_what_is_close_is_tried_once_more():
    job = Job(link(3e8), backward=0.05, works=(Work(1e-3, 1e-8), Work(1e-5, 5e-10)))
    found, chosen = chooser(), []
    assert 1.13 < job.step(Choice()) / job.step(Choice(1)) < CLOSE
    while not found.is_settled:
        chosen.append(found.choice)
        is_disturbed = found.choice == Choice(1) and Choice(1) not in found.measured
        found.report(job.step(found.choice) * (1.13 if is_disturbed else 1.0), job.calibrate)
    assert found.choice == Choice(1)
    changes = [choice for choice, last in zip(chosen, [None, *chosen]) if choice != last]
    assert changes.count(Choice()) == changes.count(Choice(1)) == 2


def test_a_cycle_more_is_no_change():
    found, calibrated = chooser(), []
    run(found, Job(link(1e11)), TRIES)
    least = found.measured[Choice()]
    assert 1.9 * least < least + CYCLE
    for seconds in [1.9 * least] * 9:
        found.report(seconds, calibrated.append)
    assert found.interval == PERIOD and not calibrated


def test_it_looks_again_when_the_link_may_have_become_faster():
    # Of which steps do not tell: backward hides the messages.
    slow, fast = Job(link(1e7), backward=0.5), Job(link(1e11), backward=0.5)
    found = chooser()
    run(found, slow, TRIES)
    compressed = found.choice
    assert compressed.number == 0 and slow.step(compressed) < CHANGE * fast.step(compressed)
    chosen = run(found, fast, AGAIN_STEPS + TRIES)
    assert set(chosen[: AGAIN_STEPS - TRIES]) == {compressed} and chosen[-1] == Choice()


def test_what_is_predicted_alike_is_tried_in_the_order_of_care():
    nothing = (Work(0.0, 0.0), Work(0.0, 0.0))
    auto = Auto(Float16(error_feedback=False), PowerSGD(4, min_compression_rate=1))
    for names in ("abc", "cab", "bca"):
        found = Chooser(auto, dict.fromkeys(names, (100, 100)), leading_rows)
        found.settle(Choice(1))
        waiting = Network(2, *[Curve(((0, 1e-3), (1e9, 1e-3)))] * 4)
        for _ in range(TRIES):
            if found.report(1e-3, lambda: (waiting, nothing)) != Choice(1):
                break
        assert found.predicted[Choice()] == found.predicted[Choice(0)] and found.choice == Choice()


def test_it_does_not_look_again_from_a_disturbed_report():
    job = Job(link(1e11), backward=0.5)
    found = chooser()
    run(found, job, TRIES)
    expected = found.measured[Choice()]
    while found._steps + found.interval < AGAIN_STEPS:
        found.report(expected, job.calibrate)
    found.report(2 * expected, job.calibrate)
    assert found._steps >= AGAIN_STEPS and found.measured[Choice()] == expected


def test_where_nothing_can_be_measured_the_choice_stays_until_it_can():
    job, asked, never = Job(link(1e7)), [], Job(link(1e7))
    found, usual = chooser(), chooser()
    for _ in range(20):
        assert found.report(job.step(Choice()), lambda: asked.append(True)) == Choice() and not found.predicted
    assert len(asked) == 20 // LEAST_STEPS
    assert run(found, job, TRIES)[-1] == run(usual, never, TRIES)[-1] != Choice() and found.is_settled
    chosen = found.choice
    for _ in range(3 * AGAIN_STEPS):
        found.report(10 * job.step(chosen), lambda: asked.append(True))
    assert found.choice == chosen and len(asked) > 10
    found.report(10 * job.step(chosen), job.calibrate)
    assert found.measured[chosen] == 10 * job.step(chosen)


def test_long_steps_are_compared_after_fewer_of_them():
    found = chooser()
    run(found, Job(link(1e11), backward=0.04), TRIES)
    assert found.interval == 7  # of 41 ms
    run(found, Job(link(1e11), backward=0.06), found.interval)
    assert found.interval == FEW


def test_a_choice_that_was_saved_is_where_it_begins():
    found, saved = chooser(), Choice(0, frozenset({"small"}))
    found.settle(saved)
    assert set(run(found, Job(link(1e7)), TRIES)) == {saved}
    found = chooser()
    found.settle(saved)
    assert run(found, Job(link(1e11)), TRIES)[-1] == Choice()


def test_a_candidate_that_compresses_nothing_is_none():
    found = Chooser(Auto(PowerSGD(rank=4)), {"vector": (1000,), "small": (4, 4)}, leading_rows)
    assert not any(layout_of(shape, PowerSGD(4)).compressed for shape in [(1000,), (4, 4)])
    job = Job(link(1e5), works=(Work(1e-4, 1e-9),))
    assert {found.report(1.0, job.calibrate) for _ in range(TRIES)} == {Choice()}


def test_candidates():
    class FP16Compressor:  # as Horovod's is called
        decompress = None

    class NoneCompressor:
        decompress = None

    assert Auto(NoneCompressor, FP16Compressor).candidates == (Float16(error_feedback=False),)
    assert Auto().candidates == (Float16(error_feedback=False), PowerSGD(rank=8))
    assert Auto(NoCompression(), PowerSGD(2)).candidates == (PowerSGD(2),)
    assert Auto().linear and not Auto(PowerSGD(2, wire_dtype="int8")).linear


@pytest.mark.parametrize(
    "candidate, error",
    [
        (4, TypeError),
        (Accordion(PowerSGD(4), PowerSGD(2), interval=2), ValueError),
        (PowerSGD(warmup_steps=3), ValueError),
        (PowerSGD(hierarchical=True), ValueError),
        (Auto(), ValueError),
        (NoCompression(), ValueError),
    ],
)
def test_what_can_be_no_candidate(candidate, error):
    with pytest.raises(error, match="Auto"):
        Auto(candidate)


def test_candidates_share_a_memory_of_one_dtype():
    halves = PowerSGD(4, memory_dtype="bfloat16")
    assert Auto(Float16(error_feedback=False), halves).memory_dtype == "bfloat16"
    with pytest.raises(ValueError, match="Auto: .* one memory_dtype"):
        Auto(halves, PowerSGD(8))
