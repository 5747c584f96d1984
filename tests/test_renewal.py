"""PowerSGD(refresh_every=...): where a warm start does not converge, and what brings it back."""

import numpy as np
import pytest

from horovod_powersgd import PowerSGD
from horovod_powersgd.reference import State, simulate

RATE = 0.05


def train(config, steps, workers=2):
    """Least squares, |W x - y|^2 / 2, with W = 0 at first; the last W, and the first worker's memory.

    Feature 0 is in every example; it belongs to output 0, whose noise no W can explain. Feature 1 comes from the second
    step on, and makes output 1: y_1 = x_1.
    """
    weights, states = np.zeros((8, 8)), [State() for _ in range(workers)]
    for step in range(steps):
        gradients = []
        for worker in range(workers):
            features, target = np.zeros(8), np.zeros(8)
            features[0], target[0] = 1, np.random.default_rng([step, worker]).choice([-1.5, -1, 1, 1.5])
            features[1] = target[1] = step > 0
            error = weights @ features - target
            # Each output has examples of its own: no gradient of one with the other's feature.
            gradients.append({"w": np.diag(error * features)})
        weights -= RATE * simulate(gradients, states, config)[0]["w"]
    return weights, states[0].memory["w"]


@pytest.mark.parametrize("half_steps", [2, 3])
def test_a_warm_start_never_learns_what_was_not_there_at_first(half_steps):
    # In the first step the gradient has nothing in column 1, so nor has Q. From then on P and Q only ever meet the
    # noise of output 0, and what column 1 is due piles up in the memory, however large it gets.
    config = PowerSGD(rank=1, min_compression_rate=0, num_iters_per_step=half_steps)
    weights, memory = train(config, 400)
    longer, more = train(config, 800)
    assert weights[1, 1] == longer[1, 1] == 0
    assert abs(memory[1, 1]) > 300 and abs(more[1, 1]) > 700


@pytest.mark.parametrize("half_steps", [1, 2, 3])
def test_a_subspace_that_is_renewed_learns_it(half_steps):
    config = PowerSGD(rank=1, min_compression_rate=0, num_iters_per_step=half_steps, refresh_every=10)
    weights, memory = train(config, 800)
    assert abs(weights[1, 1] - 1) < 0.05 and np.linalg.norm(memory) < 10


def test_a_renewal_comes_nearer_to_the_best_approximation_than_a_warm_start():
    rng = np.random.default_rng(0)
    renewed, warm = [], []
    state, config = [State()], PowerSGD(rank=2, refresh_every=5)
    signal = (rng.standard_normal((60, 60)) / np.sqrt(1 + np.arange(60))) @ rng.standard_normal((60, 80))
    for step in range(40):
        gradient = signal + 3 * rng.standard_normal((60, 80))
        delta = gradient + state[0].memory.get("w", 0)
        update = simulate([{"w": gradient}], state, config)[0]["w"]
        part = np.linalg.norm(update) / np.linalg.norm(np.linalg.svd(delta)[1][:2])
        (renewed if config.renews(step) else warm).append(part)
    assert len(renewed) == 7 and np.mean(renewed) > np.mean(warm[5:])


def test_when_a_subspace_is_renewed_and_how():
    config = PowerSGD(refresh_every=3)
    assert [config.renews(step) for step in range(7)] == [False, False, False, True, False, False, True]
    assert (config.half_steps(False), config.half_steps(True)) == (2, 4)
    assert not PowerSGD().renews(3)
    for half_steps, renewing in ((1, 5), (3, 5), (4, 4), (7, 7)):
        assert PowerSGD(num_iters_per_step=half_steps).half_steps(True) == renewing
