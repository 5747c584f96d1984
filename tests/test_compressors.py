"""What each compressor is, by its definition, in the numpy reference; how it counts bytes; and what it refuses."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import cases
import documented
from horovod_powersgd import (
    Accordion,
    Allgather,
    AllreduceMean,
    Atomo,
    BestRank,
    Custom,
    Float16,
    GradiVeq,
    NoCompression,
    PowerSGD,
    QuantizedMean,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    TopK,
    UnbiasedRank,
    quantization,
)
from horovod_powersgd.arguments import compressor_of
from horovod_powersgd.reference import State, exchange, lockstep, simulate

WORKERS = st.integers(1, 4)
SIDES = st.integers(2, 24)


def matrices(seed, workers, rows, columns, dtype="float64"):
    return [np.random.default_rng([seed, w]).standard_normal((rows, columns)).astype(dtype) for w in range(workers)]


def step(config, gradients, states):
    """The update of one step of one matrix."""
    updates = simulate([{"w": gradient} for gradient in gradients], states, config)
    assert all((update["w"] == updates[0]["w"]).all() for update in updates)
    return updates[0]["w"]


def fresh(workers):
    return [State() for _ in range(workers)]


@pytest.mark.parametrize("cls", [RandomK, RandomBlock])
@given(WORKERS, SIDES, SIDES, st.floats(0.01, 1))
def test_random_entries_are_the_same_on_all_workers_and_their_mean_arrives(cls, workers, rows, columns, ratio):
    states, config = fresh(workers), cls(ratio, seed=3)
    kept = max(1, int(ratio * rows * columns + 1e-9))
    for number in range(3):
        gradients = matrices(number, workers, rows, columns)
        deltas = [g + state.memory.get("w", 0) for g, state in zip(gradients, states)]
        update = step(config, gradients, states)
        sent = states[0].memory["w"] == 0
        assert sent.sum() == kept
        np.testing.assert_allclose(update, np.where(sent, np.mean(deltas, axis=0), 0), rtol=0, atol=1e-12)
        for state, delta in zip(states, deltas):
            np.testing.assert_array_equal(state.memory["w"], np.where(sent, 0, delta))
        if cls is RandomBlock:
            # One block, which may go on at the beginning.
            assert (sent != np.roll(sent, 1)).sum() == (0 if sent.all() else 2)


@pytest.mark.parametrize("cls", [RandomK, RandomBlock])
def test_every_entry_gets_its_turn(cls):
    states, config, counts = fresh(1), cls(0.1, error_feedback=False), np.zeros((8, 10))
    for number in range(1500):
        counts += step(config, matrices(number, 1, 8, 10), states) != 0
    assert counts.sum() == 8 * 1500 and counts.min() > 100 and counts.max() < 230
    other = step(cls(0.1, seed=1), matrices(0, 1, 8, 10), fresh(1))
    assert ((other != 0) != (step(config, matrices(0, 1, 8, 10), fresh(1)) != 0)).any()


@given(WORKERS, SIDES, SIDES, st.floats(0.01, 1))
def test_top_k_sends_each_workers_largest_entries(workers, rows, columns, ratio):
    states, config = fresh(workers), TopK(ratio)
    kept = max(1, int(ratio * rows * columns + 1e-9))
    for number in range(3):
        gradients = matrices(number, workers, rows, columns)
        deltas = [g + state.memory.get("w", 0) for g, state in zip(gradients, states)]
        update = step(config, gradients, states)
        parts = []
        for delta, state in zip(deltas, states):
            smallest = np.sort(abs(delta), axis=None)[-kept]
            parts.append(np.where(abs(delta) >= smallest, delta, 0))
            np.testing.assert_array_equal(state.memory["w"], delta - parts[-1])
        np.testing.assert_allclose(update, np.mean(parts, axis=0), rtol=0, atol=1e-12)


@given(WORKERS, SIDES, SIDES)
def test_sign_norm_sends_signs_and_their_mean_magnitude(workers, rows, columns):
    states = fresh(workers)
    for number in range(3):
        gradients = matrices(number, workers, rows, columns)
        deltas = [g + state.memory.get("w", 0) for g, state in zip(gradients, states)]
        parts = [np.sign(delta) * abs(delta).sum() / delta.size for delta in deltas]
        np.testing.assert_allclose(step(SignNorm(), gradients, states), np.mean(parts, axis=0), rtol=0, atol=1e-12)
        for state, delta, part in zip(states, deltas, parts):
            np.testing.assert_allclose(state.memory["w"], delta - part, rtol=0, atol=1e-12)


@given(WORKERS, SIDES, SIDES, st.floats(0, 0.95))
def test_signum_goes_where_most_momenta_point(workers, rows, columns, momentum):
    states, momenta = fresh(workers), [0] * workers
    for number in range(4):
        gradients = matrices(number, workers, rows, columns)
        momenta = [momentum * m + (1 - momentum) * g for m, g in zip(momenta, gradients)]
        expected = np.sign(sum(np.sign(m) for m in momenta))
        np.testing.assert_array_equal(step(Signum(momentum), gradients, states), expected)


def best(matrix, rank):
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank]


@given(WORKERS, st.integers(8, 24), st.integers(8, 24), st.integers(1, 3))
def test_best_rank_averages_each_workers_best_approximation(workers, rows, columns, rank):
    states = fresh(workers)
    for number in range(3):
        gradients = matrices(number, workers, rows, columns)
        deltas = [g + state.memory.get("w", 0) for g, state in zip(gradients, states)]
        expected = np.mean([best(delta, rank) for delta in deltas], axis=0)
        np.testing.assert_allclose(step(BestRank(rank), gradients, states), expected, rtol=0, atol=1e-9)
        for state, delta in zip(states, deltas):
            np.testing.assert_allclose(state.memory["w"], delta - best(delta, rank), rtol=0, atol=1e-9)


@given(WORKERS, st.integers(8, 24), st.integers(8, 24), st.integers(1, 3))
def test_unbiased_rank_multiplies_the_mean_by_a_random_u_and_its_transpose(workers, rows, columns, rank):
    config, gradients = UnbiasedRank(rank), matrices(0, workers, rows, columns)
    # The identity tells U U^T; U depends on the tensor's name, its columns and the step.
    projection = step(config, [np.eye(max(columns, 8), columns)] * workers, fresh(workers))[:columns]
    assert np.linalg.matrix_rank(projection) == rank and (np.linalg.eigvalsh(projection) > -1e-12).all()
    update = step(config, gradients, fresh(workers))
    np.testing.assert_allclose(update, np.mean(gradients, axis=0) @ projection, rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", [UnbiasedRank(2), Atomo(2), Atomo(4)])
def test_estimates_without_error_feedback_are_right_on_average(config):
    gradients, states = matrices(0, 2, 12, 10), fresh(2)
    updates = np.array([step(config, gradients, states) for _ in range(4000)])
    spread = updates.std(axis=0) / np.sqrt(len(updates))
    assert abs((updates.mean(axis=0) - np.mean(gradients, axis=0)) / spread).max() < 5
    assert not states[0].memory


@given(st.integers(12, 20), st.integers(12, 20), st.integers(1, 5))
def test_atomo_sends_so_many_singular_vectors_each_scaled_by_its_chance(rows, columns, rank):
    [gradient], states = matrices(1, 1, rows, columns), fresh(1)
    gradient = gradient * np.geomspace(1, 1e-2, columns)  # some of them are certain
    u, values, vt = np.linalg.svd(gradient, full_matrices=False)
    scales = np.array([np.diag(u.T @ step(Atomo(rank), [gradient], states) @ vt.T) / values for _ in range(10)])
    assert ((scales > 1e-9).sum(axis=1) == rank).all() and (scales[scales > 1e-9] > 1 - 1e-9).all()
    # A vector has one chance, whenever it is sent; none is sent with a smaller chance than a smaller one.
    chances = [1 / column[column > 1e-9] for column in scales.T]
    assert all(np.ptp(chance) < 1e-6 for chance in chances if len(chance))
    found = [chance[0] for chance in chances if len(chance)]
    assert all(before >= after - 1e-9 for before, after in zip(found, found[1:]))


def test_atomo_sends_matrices_of_low_rank_and_of_zeros():
    for gradient in (np.zeros((9, 8)), np.outer(np.arange(9.0), np.ones(8))):
        np.testing.assert_allclose(step(Atomo(3), [gradient], fresh(1)), gradient, atol=1e-9)


@given(WORKERS, st.integers(6, 20), st.integers(6, 20))
@settings(max_examples=20)
def test_gradiveq_learns_a_basis_from_means_and_sends_coordinates_in_it(workers, rows, columns):
    width, dimensions = 16, 3
    config, states = GradiVeq(width, dimensions, learning_steps=2, compressed_steps=2), fresh(workers)
    for number in range(8):
        if number % 4 == 0:
            products = 0
        gradients = matrices(number, workers, rows, columns)
        deltas = [g + state.memory.get("w", 0) for g, state in zip(gradients, states)]
        mean = np.mean(deltas, axis=0)
        slices = np.pad(mean.ravel(), (0, -mean.size % width)).reshape(-1, width)
        if number % 4 < 2:
            expected, products = mean, products + slices.T @ slices
            basis = np.linalg.svd(products)[0][:, :dimensions]
        else:
            expected = (slices @ basis @ basis.T).ravel()[: mean.size].reshape(mean.shape)
        np.testing.assert_allclose(step(config, gradients, states), expected, rtol=0, atol=1e-9)
        left = np.mean([state.memory["w"] for state in states], axis=0)
        np.testing.assert_allclose(left, mean - expected, rtol=0, atol=1e-9)


def test_float16_sends_half_precision_and_keeps_what_rounding_loses():
    gradients, states = matrices(0, 1, 20, 30, "float32"), fresh(1)
    update = step(Float16(), gradients, states)
    np.testing.assert_array_equal(update, gradients[0].astype("float16").astype("float32"))
    np.testing.assert_array_equal(states[0].memory["w"], gradients[0] - update)
    too_large = simulate([{"w": gradients[0] * 1e6}], states, Float16())[0]["w"]
    assert not np.isfinite(too_large).any() and states[0].steps == 1


def test_no_compression_is_the_mean():
    gradients = matrices(0, 3, 20, 30)
    np.testing.assert_allclose(step(NoCompression(), gradients, fresh(3)), np.mean(gradients, axis=0), atol=1e-15)


@pytest.mark.parametrize("config", [c for c in [*cases.COMPRESSORS, *cases.ACCORDIONS] if c.error_feedback])
@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_is_lost_with_error_feedback(config, workers):
    states, given_sum, update_sum = fresh(workers), 0, 0
    for number in range(12):
        gradients = matrices(number, workers, 20, 30)
        given_sum = given_sum + np.mean(gradients, axis=0)
        update_sum = update_sum + step(config, gradients, states)
    left = np.mean([state.memory["w"] for state in states], axis=0)
    # The mean of numbers in half precision is rounded once more.
    rounding = 2e-2 if isinstance(config, Float16) else 1e-11
    np.testing.assert_allclose(update_sum + left, given_sum, rtol=0, atol=rounding)


def test_the_compressor_that_the_docs_show_averages_rows():
    assert documented.LINES <= 20
    states, given_sum, update_sum = fresh(3), 0, 0
    for number in range(5):
        gradients = matrices(number, 3, 20, 30)
        update = step(documented.random_rows, gradients, states)
        assert (update.any(axis=1)).sum() == 2
        given_sum, update_sum = given_sum + np.mean(gradients, axis=0), update_sum + update
    left = np.mean([state.memory["w"] for state in states], axis=0)
    np.testing.assert_allclose(update_sum + left, given_sum, rtol=0, atol=1e-12)


def test_atomo_with_error_feedback_lets_the_memory_grow():
    # Why it has none: its estimate of a matrix with many like singular values is longer than the matrix.
    states = fresh(1)
    for number in range(40):
        step(Atomo(2, error_feedback=True), matrices(number, 1, 30, 30), states)
    assert np.linalg.norm(states[0].memory["w"]) > 1000 * np.linalg.norm(matrices(0, 1, 30, 30))


def counted(worker, counts, workers):
    """The worker's generator, one of so many, whose requests' bytes are counted; [sent, received]."""
    answer = None
    while True:
        try:
            request = worker.send(answer)
        except StopIteration as finished:
            return finished.value
        if isinstance(request, QuantizedMean):
            lengths = [
                length
                for name, matrix in reversed(request.tensors.items())
                for count, length in quantization.rows_of(matrix.shape, request.row[name])
                for _ in range(count)
            ]
            counts += np.array(quantization.traffic(lengths, workers, 4))
            answer = yield request
            continue
        for tensors in request.tensors.values():
            parts = [tensors] if isinstance(request, AllreduceMean) else tensors
            counts[0] += sum(part.nbytes for part in parts)
        answer = yield request
        for tensors in answer.values():
            parts = [tensors] if isinstance(request, AllreduceMean) else tensors
            assert isinstance(request, (AllreduceMean, Allgather))
            counts[1] += sum(part.nbytes for part in parts)


@pytest.mark.parametrize("config", [*cases.COMPRESSORS, *cases.CONFIGS], ids=repr)
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_traffic_is_what_the_workers_ask_for(config, workers):
    shapes = cases.SHAPES.values()
    states = fresh(workers)
    for number in range(8):
        counts = np.zeros((workers, 2), int)
        gradients = [cases.gradients(number, worker, "float32") for worker in range(workers)]
        exchanges = [exchange(g, states[w], config, worker=w, workers=workers) for w, g in enumerate(gradients)]
        lockstep([counted(one, c, workers) for one, c in zip(exchanges, counts)])
        assert {tuple(c) for c in counts} == {config.traffic(shapes, workers, step=number)}
        received = counts[0][1]
        assert (received == counts[0][0]) if config.linear else (received > counts[0][0])
    assert config.traffic(shapes, 1) == (0, 0)


def test_half_precision_matrices_travel_in_single_precision_and_vectors_as_they_are():
    shapes, sides = [(64, 48), (64,)], 64 + 48
    assert PowerSGD(rank=2).traffic(shapes, 2, itemsize=2) == (2 * sides * 4 + 64 * 2,) * 2
    in_halves = PowerSGD(rank=2, wire_dtype="float16")
    assert in_halves.traffic(shapes, 2, itemsize=2, step=0) == (2 * sides * 4 + 64 * 2,) * 2
    assert in_halves.traffic(shapes, 2, itemsize=2, step=1) == (2 * sides * 2 + 64 * 2,) * 2


def test_a_function_can_have_arguments():
    def scaled(factor, delta, state, offset=0.0):
        mean = yield AllreduceMean(delta)
        return factor * mean + offset, delta

    one, other = (compressor_of(functools.partial(scaled, 2.0, offset=offset)) for offset in (0.0, 1.0))
    assert "scaled, 2.0, offset=0.0" in repr(one) and repr(one) != repr(other)
    gradients = matrices(0, 2, 20, 30)
    np.testing.assert_allclose(step(one, gradients, fresh(2)), 2 * np.mean(gradients, axis=0))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: RandomK(0), ValueError, "RandomK: ratio must be a finite number, above 0 and at most 1, not 0"),
        (lambda: TopK(1.5), ValueError, "TopK: ratio"),
        (lambda: TopK("0.1"), TypeError, "TopK: ratio must be a number"),
        (lambda: RandomBlock(0.1, error_feedback=1), TypeError, "RandomBlock: error_feedback"),
        (lambda: RandomBlock(0.1, seed=-1), ValueError, "RandomBlock: seed"),
        (lambda: SignNorm("yes"), TypeError, "SignNorm: error_feedback"),
        (lambda: Signum(1.0), ValueError, "Signum: momentum must be a finite number, at least 0 and below 1"),
        (lambda: BestRank(0), ValueError, "BestRank: rank must be 1 or more"),
        (lambda: UnbiasedRank(2.5), TypeError, "UnbiasedRank: rank must be an integer"),
        (lambda: Atomo(1, seed=1.5), TypeError, "Atomo: seed"),
        (lambda: GradiVeq(16, 16), ValueError, "GradiVeq: dimensions must be below slice_size, 16"),
        (lambda: GradiVeq(learning_steps=0), ValueError, "GradiVeq: learning_steps"),
        (lambda: PowerSGD(refresh_every=0), ValueError, "PowerSGD: refresh_every must be 1 or more"),
        (lambda: Custom(print), TypeError, "Custom: function must be a generator function"),
        (lambda: compressor_of("fp16"), TypeError, "compression must be a compressor"),
        (lambda: Accordion(PowerSGD(2), PowerSGD(1)), ValueError, "interval is required"),
        (lambda: Accordion(PowerSGD(2), PowerSGD(1), interval=0), ValueError, "interval must be 1 or more"),
        (lambda: Accordion(PowerSGD(2), PowerSGD(1), 0, 5), ValueError, "threshold must be a finite number, above 0"),
        (lambda: Accordion(PowerSGD(1), PowerSGD(2), interval=5), ValueError, "low is the lower compression"),
        (lambda: Accordion(PowerSGD(2), TopK(0.1), interval=5), ValueError, "must be of one kind"),
        (lambda: Accordion(SignNorm(), SignNorm(), interval=5), ValueError, "a rank or a ratio"),
        (lambda: Accordion(PowerSGD(2, seed=1), PowerSGD(1), interval=5), ValueError, "differ only in rank"),
        (lambda: Accordion(PowerSGD(2), None, interval=5), TypeError, "high must be a compressor"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
