"""PowerSGD's generator, which serves every framework's arrays, against the formulas of the paper."""

import importlib

import numpy as np
import pytest

from horovod_powersgd import AllreduceMean, PowerSGD, arrays
from horovod_powersgd.compressors.matrix_state import MatrixState
from horovod_powersgd.factors import initial_factor
from horovod_powersgd.randomness import key_of

N, M = 24, 30


@pytest.fixture(params=["numpy", "torch", "tensorflow"])
def framework(request):
    """(its arrays, numpy to its tensor)"""
    if request.param == "numpy":
        return arrays, np.array
    module = pytest.importorskip(request.param)
    to_tensor = module.from_numpy if request.param == "torch" else module.constant
    return importlib.import_module(f"horovod_powersgd.{request.param}.arrays"), lambda x: to_tensor(np.array(x))


def run(framework, config, deltas, kept):
    """One step of workers with these deltas: [(update, sent)] as numpy arrays, what they keep, and how many rounds."""
    xp, to_tensor = framework
    states = [MatrixState(xp, "w", (N, M), key_of("w", config.seed), kept, to_tensor) for _ in deltas]
    for worker, state in enumerate(states):
        state.begin(len(kept), config.amount(N, M), worker, len(deltas), True)
    generators = [config.exchange(to_tensor(delta), state) for delta, state in zip(deltas, states)]
    requests, results, rounds = [next(generator) for generator in generators], [], 0
    while not results:
        assert all(isinstance(request, AllreduceMean) for request in requests)
        mean, rounds = sum(request.tensors for request in requests) / len(deltas), rounds + 1
        requests = []
        for generator in generators:
            try:
                requests.append(generator.send(mean))
            except StopIteration as finished:
                results.append([np.asarray(part) for part in finished.value])
    return results, states[0].kept, rounds


def test_a_step_is_the_papers_algorithm(framework):
    config = PowerSGD(rank=3, seed=5)
    deltas = [np.random.default_rng(worker).standard_normal((N, M)) for worker in range(2)]
    q, kept = initial_factor("w", M, 3, 5), {}
    for _ in range(3):
        results, kept, rounds = run(framework, config, deltas, kept)
        p = np.linalg.qr(np.mean(deltas, axis=0) @ np.linalg.qr(q)[0])[0]
        q = np.mean(deltas, axis=0).T @ p
        for (update, sent), delta in zip(results, deltas):
            np.testing.assert_allclose(update, p @ q.T, atol=1e-10)
            np.testing.assert_allclose(sent, p @ p.T @ delta, atol=1e-10)
        assert rounds == 2 and kept.keys() == {"factor"}


@pytest.mark.parametrize("half_steps", [1, 3])
def test_an_odd_number_of_half_steps_goes_on_with_the_other_factor(framework, half_steps):
    if "tensorflow" in framework[0].__name__:
        pytest.skip("a graph cannot choose by what is kept; TensorFlow has a faster way of its own")
    config = PowerSGD(rank=3, num_iters_per_step=half_steps)
    delta, kept = np.random.default_rng(0).standard_normal((N, M)), {}
    for step in range(4):
        [(update, sent)], kept, rounds = run(framework, config, [delta], kept)
        np.testing.assert_allclose(update, sent, atol=1e-10)
        assert rounds == half_steps and bool(kept["factor_is_q"]) == (step % 2 == 1)
        assert kept["factor"].shape == (M if step % 2 else N, 3)
