"""Accordion, in the numpy reference: a gradient sequence whose regimes are known."""

import numpy as np
import pytest

from horovod_powersgd import Accordion, PowerSGD, TopK
from horovod_powersgd.compressors.accordion import is_critical
from horovod_powersgd.reference import State, resized, simulate

INTERVAL = 3
# The size of the gradients in each interval, and what follows for the next one.
SIZES = [8, 8, 8, 2, 2, 2.5, 4, 4]
REGIMES = ["low", "low", "high", "high", "low", "high", "high", "low", "high"]


def gradients(step, workers, size):
    """A matrix of the same directions in all steps."""
    u, v = (np.random.default_rng(i).standard_normal((side, 4)) for i, side in enumerate((30, 40)))
    noise = [np.random.default_rng([step, w]).standard_normal((30, 40)) for w in range(workers)]
    return [{"w": size * (u @ v.T + 0.01 * n)} for n in noise]


def run(config, rates=None, workers=2, sizes=SIZES):
    """The states after all intervals and one more step, and each step's update."""
    states, updates = [State() for _ in range(workers)], []
    for step in range(len(sizes) * INTERVAL + 1):
        size = sizes[min(step // INTERVAL, len(sizes) - 1)]
        rate = None if rates is None else rates(step)
        updates.append(simulate(gradients(step, workers, size), states, config, learning_rate=rate)[0]["w"])
    return states, updates


@pytest.mark.parametrize("low, high", [(PowerSGD(4), PowerSGD(1)), (TopK(0.5), TopK(0.02))])
def test_each_interval_has_the_compression_that_the_last_two_call_for(low, high):
    # An update of rank 1 or of few entries is a part of the gradient, but the memory brings the rest in time; so here
    # sums are compared without the memory's help: the regimes are those of the gradients.
    config = Accordion(low, high, interval=INTERVAL)
    states, updates = run(config)
    decisions = states[0].regimes["w"].decisions
    assert [step for step, _ in decisions] == [INTERVAL * i for i in range(len(REGIMES))]
    norms = [np.linalg.norm(sum(updates[i : i + INTERVAL])) for i in range(0, len(SIZES) * INTERVAL, INTERVAL)]
    expected = ["low", "low"] + ["low" if abs(a - b) / a >= 0.5 else "high" for a, b in zip(norms, norms[1:])]
    assert [regime for _, regime in decisions] == expected
    assert "high" in expected and "low" in expected[expected.index("high") :]
    if isinstance(low, PowerSGD):
        ranks = [np.linalg.matrix_rank(update) for update in updates]
        assert ranks == [{"low": 4, "high": 1}[expected[step // INTERVAL]] for step in range(len(updates))]


def test_low_compression_that_loses_nothing_sees_the_gradients_own_regimes():
    # Both ranks take in the gradients' four directions, so that sums of updates are sums of gradients.
    config = Accordion(PowerSGD(6), PowerSGD(5), interval=INTERVAL)
    states, _ = run(config)
    assert [regime for _, regime in states[0].regimes["w"].decisions] == REGIMES


def test_a_lower_learning_rate_means_low_compression_until_the_interval_ends():
    config = Accordion(PowerSGD(6), PowerSGD(5), interval=INTERVAL)
    rates = {10: 0.1, 18: 0.01}

    def rate(step):
        return min((r for start, r in rates.items() if step >= start), default=1.0)

    states, _ = run(config, rate, sizes=[8] * 8)
    found = dict(states[0].regimes["w"].decisions)
    expected = {3 * i: "low" if i < 2 else "high" for i in range(9)}
    assert found == {**expected, 10: "low", 18: "low"}
    # A rate that rises, or is the same, means nothing.
    states, _ = run(config, lambda step: 1.0 + step, sizes=[8] * 8)
    assert dict(states[0].regimes["w"].decisions) == expected


def test_layers_decide_by_themselves():
    config = Accordion(PowerSGD(6), PowerSGD(5), interval=INTERVAL)
    states = [State(), State()]
    for step in range(16):
        calm, wild = gradients(step, 2, 8), gradients(step, 2, 8 * 4 ** (step // INTERVAL))
        simulate([{"calm": c["w"], "wild": w["w"]} for c, w in zip(calm, wild)], states, config)
    assert [regime for _, regime in states[0].regimes["calm"].decisions] == ["low", "low"] + 4 * ["high"]
    assert [regime for _, regime in states[0].regimes["wild"].decisions] == 6 * ["low"]
    assert states[0].regimes.keys() == states[1].regimes.keys()
    for name, regime in states[0].regimes.items():
        assert regime.decisions == states[1].regimes[name].decisions
        np.testing.assert_array_equal(regime.total, states[1].regimes[name].total)


def test_switching_keeps_the_memory():
    config = Accordion(PowerSGD(4), PowerSGD(1), interval=INTERVAL)
    states, given, arrived = [State(), State()], 0, 0
    for step in range(30):
        both = gradients(step, 2, SIZES[step // INTERVAL % len(SIZES)])
        given = given + np.mean([g["w"] for g in both], axis=0)
        arrived = arrived + simulate(both, states, config)[0]["w"]
    left = np.mean([state.memory["w"] for state in states], axis=0)
    np.testing.assert_allclose(arrived + left, given, atol=1e-9)
    assert {regime for _, regime in states[0].regimes["w"].decisions} == {"low", "high"}


def test_a_step_that_is_not_finite_decides_nothing():
    config, states = Accordion(PowerSGD(4), PowerSGD(1), interval=1), [State(), State()]
    for step in range(5):
        simulate(gradients(step, 2, 8), states, config, learning_rate=1.0)
    before = states[0].regimes["w"]
    poisoned = gradients(5, 2, 8)
    poisoned[1]["w"][3, 4] = np.inf
    assert np.isnan(simulate(poisoned, states, config, learning_rate=0.1)[0]["w"]).all()
    assert states[0].regimes["w"] is before and states[0].steps == 5
    simulate(gradients(5, 2, 8), states, config, learning_rate=0.1)
    assert states[0].regimes["w"].decisions[-1] == (5, "low")


@pytest.mark.parametrize(
    "last, now, critical",
    [(None, 1.0, True), (0.0, 0.0, True), (1.0, 1.49, False), (1.0, 1.5, True), (1.0, 0.5, True), (1.0, 0.51, False)],
)
def test_what_is_critical(last, now, critical):
    assert is_critical(last, now, 0.5) is critical


def test_a_factor_shrinks_to_its_largest_directions_and_grows_by_fresh_ones():
    rng = np.random.default_rng(0)
    base, _ = np.linalg.qr(rng.standard_normal((40, 4)))
    factor = (base * [5.0, 0.1, 3.0, 0.2]) @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    smaller = resized(factor, 2, rng.standard_normal((40, 2)))
    projection = smaller @ np.linalg.pinv(smaller)
    assert smaller.shape == (40, 2)
    assert np.linalg.norm(projection @ base[:, [0, 2]] - base[:, [0, 2]]) < 0.1
    fresh = rng.standard_normal((40, 5))
    larger = resized(smaller, 5, fresh)
    np.testing.assert_array_equal(larger[:, :2], smaller)
    assert larger.shape == (40, 5) and np.linalg.matrix_rank(larger) == 5
    np.testing.assert_array_equal(resized(0 * smaller, 5, fresh)[:, 2:], fresh[:, 2:])
