"""What the paper promises, held by the numpy reference."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from horovod_powersgd import PowerSGD, arrays
from horovod_powersgd.compressors.powersgd import WIRE_DTYPES
from horovod_powersgd.randomness import SPARE, key_of, random_factor
from horovod_powersgd.reference import (
    OptimizerState,
    State,
    algorithm_2,
    exchange,
    initial_factor,
    lockstep,
    orthogonalize,
    simulate,
)

SIDES = st.integers(1, 24)
DTYPES = st.sampled_from([np.float32, np.float64])
EVERYTHING = dict(min_compression_rate=0)
ROUNDING = {np.float32: 2e-5, np.float64: 1e-12}


def random_matrix(seed, rows, columns, dtype=np.float64, rank=None):
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.standard_normal((rows, columns)).astype(dtype)
    return (rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))).astype(dtype)


def one_step(matrices, config, states=None):
    """The update of one step of one matrix, and the workers' states."""
    states = states or [State() for _ in matrices]
    updates = simulate([{"w": matrix} for matrix in matrices], states, config)
    for update in updates:
        assert (update["w"] == updates[0]["w"]).all()
    return updates[0]["w"], states


@given(SIDES, SIDES, st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), DTYPES)
def test_workers_exchange_equals_one_worker_with_their_mean(rows, columns, rank, workers, half_steps, dtype):
    config = PowerSGD(rank=rank, num_iters_per_step=half_steps, **EVERYTHING)
    matrices = [random_matrix(w, rows, columns, dtype) for w in range(workers)]
    together, states = one_step(matrices, config)
    alone, [state] = one_step([np.mean(matrices, axis=0, dtype=np.float64).astype(dtype)], config)
    size = np.linalg.norm(alone) + 1
    # Where few columns make a narrow matrix, rounding turns the basis: the angle, not the digits, is what is lost.
    assert np.linalg.norm(together - alone) <= 100 * ROUNDING[dtype] * size
    mean_memory = np.mean([state.memory["w"] for state in states], axis=0)
    assert np.linalg.norm(mean_memory - state.memory["w"]) <= 100 * ROUNDING[dtype] * size


@given(SIDES, SIDES, st.integers(1, 5), st.integers(0, 5), DTYPES)
def test_a_matrix_of_low_rank_arrives_whole(rows, columns, rank, matrix_rank, dtype):
    matrix = random_matrix(0, rows, columns, dtype, rank=min(rank, matrix_rank))
    update, [state] = one_step([matrix], PowerSGD(rank=rank, **EVERYTHING))
    assert np.linalg.norm(update - matrix) <= 100 * ROUNDING[dtype] * (np.linalg.norm(matrix) + 1)
    assert np.linalg.norm(state.memory["w"]) <= 100 * ROUNDING[dtype] * (np.linalg.norm(matrix) + 1)


@given(st.integers(2, 16), st.integers(2, 16), st.integers(1, 4))
def test_more_half_steps_come_closer_to_the_best_approximation(rows, columns, rank):
    rank = min(rank, rows, columns)
    u, _ = np.linalg.qr(random_matrix(1, rows, rows))
    v, _ = np.linalg.qr(random_matrix(2, columns, columns))
    values = 0.5 ** np.arange(min(rows, columns))
    matrix = (u[:, : len(values)] * values) @ v[:, : len(values)].T
    best = np.linalg.norm(values[rank:])
    errors = [
        np.linalg.norm(one_step([matrix], PowerSGD(rank=rank, num_iters_per_step=k, **EVERYTHING))[0] - matrix)
        for k in (2, 4, 8, 40)
    ]
    assert all(after <= before + 1e-12 for before, after in zip(errors, errors[1:]))
    assert best - 1e-12 <= errors[-1] <= best + 1e-9


@given(SIDES, SIDES, st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.sampled_from(WIRE_DTYPES))
def test_nothing_is_lost_updates_and_memory_sum_to_the_gradients(rows, columns, rank, workers, half_steps, wire_dtype):
    config = PowerSGD(rank=rank, num_iters_per_step=half_steps, wire_dtype=wire_dtype, **EVERYTHING)
    states = [State() for _ in range(workers)]
    given_sum, update_sum = 0, 0
    for step in range(6):
        matrices = [random_matrix([step, w], rows, columns) for w in range(workers)]
        given_sum = given_sum + np.mean(matrices, axis=0)
        update_sum = update_sum + one_step(matrices, config, states)[0]
    left = np.mean([state.memory["w"] for state in states], axis=0)
    # The workers' factors are rounded before they go into the memory; only the rounding of their sum is lost.
    rounding = 2**-9 if wire_dtype == "float16" else 1e-12
    assert np.linalg.norm(update_sum + left - given_sum) <= rounding * 6 * (np.linalg.norm(given_sum) + 1)


@given(hnp.arrays(DTYPES, st.tuples(SIDES, SIDES), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=200)
def test_finite_gradients_never_make_a_number_that_is_not_finite(matrix):
    config = PowerSGD(rank=3, **EVERYTHING)
    states = None
    for gradient in (matrix, 0 * matrix, matrix):
        update, states = one_step([gradient], config, states)
        assert np.isfinite(update).all() and np.isfinite(states[0].memory["w"]).all()
    assert states[0].steps == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half_steps", [1, 2, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(value, half_steps):
    config = PowerSGD(rank=2, num_iters_per_step=half_steps)
    states = [State(), State()]
    gradients = [{n: random_matrix([w, i], 20, 30) for i, n in enumerate("ab")} for w in range(2)]
    simulate(gradients, states, config)
    before = [(state.steps, {n: m.copy() for n, m in state.memory.items()}, dict(state.factors)) for state in states]
    poisoned = [gradients[0], {"a": gradients[1]["a"].copy(), "b": gradients[1]["b"]}]
    poisoned[1]["a"][3, 4] = value
    updates = simulate(poisoned, states, config)
    for update, state, (steps, memory, factors) in zip(updates, states, before):
        assert np.isnan(update["a"]).all() and np.isfinite(update["b"]).all()
        assert (state.steps, state.factors) == (steps, factors)
        assert all((state.memory[name] == memory[name]).all() for name in memory)


def test_a_layer_of_zeros_recovers_at_once_and_keeps_its_memory():
    config = PowerSGD(rank=2)
    matrix = random_matrix(0, 20, 30, rank=2)
    update, states = one_step([np.zeros((20, 30))], config)
    assert (update == 0).all()
    update, states = one_step([matrix], config, states)
    np.testing.assert_allclose(update, matrix, atol=1e-12)
    # What is in the memory goes out while the gradient is zero.
    noise = random_matrix(1, 20, 30)
    sent, states = one_step([noise], config, states)
    for _ in range(30):
        update, states = one_step([np.zeros((20, 30))], config, states)
        sent = sent + update
    np.testing.assert_allclose(sent + states[0].memory["w"], noise, atol=1e-12)
    assert np.linalg.norm(states[0].memory["w"]) < 1e-3 * np.linalg.norm(noise)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 8), DTYPES, st.sampled_from([1e-40, 1e-20, 1, 1e30]))
def test_a_basis_is_orthonormal_whatever_it_is_made_from(rows, rank, matrix_rank, dtype, scale):
    rank = min(rank, rows)
    matrix = (random_matrix(0, rows, rank, np.float64, rank=min(matrix_rank, rank)) * scale).astype(dtype)
    basis = orthogonalize(matrix, initial_factor("spare", rows, rank, 0))
    assert basis.dtype == dtype
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-6 if dtype == np.float32 else 1e-13)
    lost = matrix - basis @ (basis.T @ matrix)
    assert np.linalg.norm(lost / scale) <= 1e-3 * np.linalg.norm(matrix / scale)


def test_one_half_step_alternates_between_the_factors():
    config = PowerSGD(rank=2, num_iters_per_step=1)
    states = None
    for is_q in (False, True, False):
        _, states = one_step([random_matrix(0, 20, 30)], config, states)
        assert states[0].factors["w"].is_q is is_q
        assert states[0].factors["w"].array.shape == ((30, 2) if is_q else (20, 2))


def test_warmup_steps_are_exchanged_uncompressed():
    config = PowerSGD(rank=1, warmup_steps=2)
    states = [State(), State()]
    for step in range(3):
        matrices = [random_matrix([step, w], 20, 30) for w in range(2)]
        update, _ = one_step(matrices, config, states)
        assert np.allclose(update, np.mean(matrices, axis=0)) == (step < 2)
        assert bool(states[0].memory) == (step == 2)


def test_without_warm_start_every_step_draws_a_fresh_factor():
    config = PowerSGD(rank=1, warm_start=False, error_feedback=False)
    matrix = random_matrix(0, 20, 30)
    states = [State()]
    updates = [one_step([matrix], config, states)[0] for _ in range(2)]
    assert not np.allclose(*updates)
    assert not states[0].memory
    for step, update in enumerate(updates):
        p = matrix @ random_factor(arrays, key_of("w", 0), step, 30, 1)
        p /= np.linalg.norm(p)
        np.testing.assert_allclose(update, p @ (p.T @ matrix), atol=1e-12)


def test_random_factors_differ_by_key_and_step_and_are_standard_normal():
    factor = random_factor(arrays, key_of("w", 0), 3, 5000, 4)
    assert factor.shape == (5000, 4) and factor.dtype == np.float64
    for other in ((key_of("w", 1), 3), (key_of("v", 0), 3), (key_of("w", 0), 4), (key_of("w", 0), SPARE)):
        assert (factor != random_factor(arrays, *other, 5000, 4)).all()
    assert np.abs(factor.mean(0)).max() < 0.05 and np.abs(factor.T @ factor / 5000 - np.eye(4)).max() < 0.1


def test_starting_factors_differ_by_name_and_seed_and_are_the_same_everywhere():
    factor = initial_factor("layer.weight", 30, 4, seed=0)
    assert factor.shape == (30, 4) and factor.dtype == np.float64
    # Whatever a model has been put into, and however many layers were counted before.
    for same in ("layer.weight", "weight", "_orig_mod.layer.weight", "dense_1/weight"):
        assert (factor == initial_factor(same, 30, 4, seed=0)).all()
    assert (factor != initial_factor("layer.bias", 30, 4, seed=0)).all()
    assert (factor != initial_factor("layer.weight", 30, 4, seed=1)).all()
    np.testing.assert_allclose(factor[0], [-0.272519, -0.937037, -0.617468, 1.927169], atol=1e-6)


def test_algorithm_2_at_full_rank_is_sgd_with_momentum():
    config = PowerSGD(rank=20, **EVERYTHING)
    parameters = [{"w": random_matrix(9, 20, 30), "b": np.ones(3)} for _ in range(3)]
    states = [OptimizerState() for _ in parameters]
    expected, momentum = dict(parameters[0]), {"w": 0, "b": 0}
    for step in range(5):
        gradients = [{"w": random_matrix([step, w], 20, 30), "b": np.full(3, float(w))} for w in range(3)]
        lockstep([algorithm_2(*worker, config, 0.1, 0.9) for worker in zip(parameters, gradients, states)])
        for name in expected:
            mean = np.mean([g[name] for g in gradients], axis=0)
            momentum[name] = 0.9 * momentum[name] + mean
            expected[name] = expected[name] - 0.1 * (mean + momentum[name])
    for worker in parameters:
        for name in expected:
            np.testing.assert_allclose(worker[name], expected[name], atol=1e-12)


def test_algorithm_2_converges_where_compression_without_error_feedback_does_not():
    target = random_matrix(3, 20, 30)

    def distance(error_feedback):
        config = PowerSGD(rank=1, error_feedback=error_feedback, warm_start=False)
        parameters, states = [{"w": np.zeros((20, 30))} for _ in range(2)], [OptimizerState() for _ in range(2)]
        for step in range(300):
            # The workers pull in directions that differ, and cancel in the mean.
            pull = random_matrix([step], 20, 30)
            gradients = [{"w": p["w"] - target + sign * pull} for p, sign in zip(parameters, (1, -1))]
            lockstep([algorithm_2(*worker, config, 0.02, 0.0) for worker in zip(parameters, gradients, states)])
        return np.linalg.norm(parameters[0]["w"] - target) / np.linalg.norm(target)

    assert distance(error_feedback=True) < 0.01 < 0.05 < distance(error_feedback=False)


def test_a_step_that_is_not_finite_does_not_move_the_parameters():
    parameters, state = {"w": np.ones((20, 30))}, OptimizerState()
    lockstep([algorithm_2(parameters, {"w": np.full((20, 30), np.nan)}, state, PowerSGD(), 0.1, 0.9)])
    assert (parameters["w"] == 1).all() and not state.momentum


def test_gradients_are_not_changed():
    gradients = {"w": random_matrix(0, 20, 30)}
    before = gradients["w"].copy()
    lockstep([exchange(gradients, State(), PowerSGD())])
    assert (gradients["w"] == before).all()
