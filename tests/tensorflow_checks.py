"""What holds in every worker of a TensorFlow job, whatever launched it."""

import numpy as np

import cases
import horovod_powersgd.tensorflow as hvd
from equivalence import RUNS, Equivalence
from horovod_powersgd import PowerSGD, reference
from horovod_powersgd.layout import trailing_columns
from tensorflow_trainee import KINDS, EagerTrainee, FunctionTrainee, KerasTrainee, any_trainee, start_with


def share(items, of_workers):
    """This launch's part: `of_workers` gives, by how many workers there are, (first, every) of the items for them.
    TensorFlow needs a second for a graph, so what is for two, three or four workers is shared by Gloo and MPI."""
    first, every = of_workers[hvd.size()]
    items = items[first::every]
    return items if hvd.size() == 1 else items[hvd.mpi_enabled() :: 2]


def runs():
    """All configurations in one precision with one worker, every other one in the other with two; four with three
    workers, and four with four."""
    return share(RUNS, {1: (1, 2), 2: (0, 4), 3: (1, 6), 4: (2, 6)})


def of_these_workers(configs):
    """Half of the configurations with two workers, the others with three, and in the other precision half of them with
    one and two of them with four."""
    configs = share(configs, {1: (1, 2), 2: (0, 2), 3: (1, 2), 4: (0, 8)})
    return [(config, cases.DTYPES[hvd.size() in (1, 4)]) for config in configs]


equivalence = Equivalence(hvd, any_trainee, trailing_columns, runs)


def check_a_run_of_20_steps_equals_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    equivalence.a_run_of_20_steps()


def check_one_step_from_an_equal_state_equals_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    equivalence.one_step_from_an_equal_state()


def check_the_other_compressors_equal_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    equivalence.a_run_of_compressors(of_these_workers(cases.COMPRESSORS))


def check_accordion_equals_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    # With one worker all, in the other precision: no launch of four has this check.
    runs = [(config, "float64") for config in cases.ACCORDIONS]
    equivalence.a_run_of_compressors(runs if hvd.size() == 1 else of_these_workers(cases.ACCORDIONS))


def check_averages_in_two_rounds_equal_the_reference():
    with cases.in_two_rounds():
        equivalence.a_run_of_compressors(share(cases.IN_8_BITS, dict.fromkeys((1, 2, 4), (0, 1))), steps=5)


def check_any_shapes_equal_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    # Each of them is a new graph.
    equivalence.any_shapes(examples=4 if hvd.size() <= 2 else 2)


def check_the_mean_of_all_workers_is_kept_in_half_precision():
    equivalence.the_mean_of_all_workers_is_kept_in_half_precision()


def check_updates_and_variables_are_the_same_bits_on_all_workers():
    # One launch tries all, each of the others one.
    all_kinds = hvd.size() == 2 and not hvd.mpi_enabled()
    kinds = KINDS if all_kinds else KINDS[(2 * hvd.size() + hvd.mpi_enabled()) % 3 :][:1]
    for trainee in [kind(PowerSGD(rank=rank)) for rank, kind in enumerate(kinds, 1)]:
        for step in range(3):
            hvd.assert_replicas_equal(trainee.exchange(cases.gradients(step, hvd.rank(), "float32")))
        hvd.assert_replicas_equal(trainee.variables)


def check_uncompressed_and_fp16_are_means():
    # With three workers it is the mean that may differ, not the kind.
    for kind in KINDS if hvd.size() <= 2 else (FunctionTrainee,):
        for compression, rounding in ((hvd.Compression.none, 1e-6), (hvd.Compression.fp16, 2**-9)):
            trainee = kind(compression)
            for step in range(2):
                gradients = [cases.gradients(step, w, "float32") for w in range(hvd.size())]
                updates = trainee.exchange(gradients[hvd.rank()])
                for name, update in updates.items():
                    mean = np.mean([g[name] for g in gradients], axis=0, dtype="float32")
                    assert cases.error(update, mean) <= rounding, (kind, compression, name)


def check_bytes_are_those_of_the_factors_and_vectors():
    numbers = {name: int(np.prod(shape)) for name, shape in cases.SHAPES.items()}
    uncompressed = 4 * sum(numbers.values())
    sides = {"conv": 16 * 8 * 3 + 3, "linear": 48 + 64, "tall": 200 + 12, "wide": 12 + 200, "square": 32 + 32}
    plain = [name for name in numbers if name not in sides or name == "conv"]
    compressed = 4 * (sum(2 * side for name, side in sides.items() if name != "conv") + sum(numbers[n] for n in plain))
    alone = hvd.size() == 1
    for kind in (EagerTrainee, KerasTrainee):
        trainee = kind(PowerSGD(rank=2, warmup_steps=1))
        trainee.exchange(cases.gradients(0, hvd.rank(), "float32"))
        warmup = trainee.stats()
        assert (warmup.steps, warmup.bytes_sent) == (1, 0 if alone else uncompressed)
        assert warmup.bytes_uncompressed == uncompressed
        assert {t.reason for t in warmup.tensors if t.name == "linear"} == {"warm-up"}
        trainee.exchange(cases.gradients(1, hvd.rank(), "float32"))
        stats = trainee.stats()
        sent = 0 if alone else compressed
        assert (stats.steps, stats.bytes_sent, stats.bytes_uncompressed) == (2, sent, uncompressed)
        assert stats.total_bytes_sent == (0 if alone else uncompressed + compressed)
        assert stats.total_bytes_uncompressed == 2 * uncompressed

        by_name = {tensor.name: tensor for tensor in stats.tensors}
        assert list(by_name) == list(cases.SHAPES)
        assert by_name["conv"].matrix_shape == (384, 3) and "min_compression_rate" in by_name["conv"].reason
        assert by_name["linear"].compressed and by_name["linear"].reason is None and by_name["linear"].rank == 2
        assert not by_name["vector"].compressed and by_name["vector"].reason == "a vector"


def check_the_residual_is_what_stayed_in_the_memory():
    for config in (PowerSGD(rank=2), PowerSGD(rank=2, num_iters_per_step=1)):
        trainee = EagerTrainee(config)
        for step in range(3):
            before = trainee.state().memory
            gradients = cases.gradients(step, hvd.rank(), "float32")
            trainee.exchange(gradients)
            after = trainee.state().memory
            compressed = [tensor for tensor in trainee.stats().tensors if tensor.compressed]
            assert len(compressed) == 4
            for tensor in compressed:
                delta = gradients[tensor.name].reshape(tensor.matrix_shape) + before.get(tensor.name, 0)
                expected = np.linalg.norm(after[tensor.name]) / np.linalg.norm(delta)
                assert abs(tensor.residual - expected) < 1e-4 and 0 < tensor.residual < 1


def check_a_step_with_a_number_that_is_not_finite_leaves_no_trace():
    kinds = (EagerTrainee, "linear", np.nan), (FunctionTrainee, "tall", np.inf), (EagerTrainee, "vector", -np.inf)
    for kind, poisoned, value in kinds:
        trainee = kind(PowerSGD(rank=2))
        for step in range(2):
            trainee.exchange(cases.gradients(step, hvd.rank(), "float32"))
        before = trainee.state()
        gradients = cases.gradients(2, hvd.rank(), "float32")
        if hvd.rank() == hvd.size() - 1:
            gradients[poisoned].flat[5] = value
        assert not np.isfinite(trainee.exchange(gradients)[poisoned]).all()
        after = trainee.state()
        assert (after.steps, trainee.stats().steps) == (2, 2)
        for name in before.memory:
            np.testing.assert_array_equal(after.memory[name], before.memory[name])
            np.testing.assert_array_equal(after.factors[name].array, before.factors[name].array)
        updates = trainee.exchange(cases.gradients(3, hvd.rank(), "float32"))
        assert all(np.isfinite(update).all() for update in updates.values())


def check_a_layer_recovers_from_gradients_of_zero():
    for config in (PowerSGD(rank=2), PowerSGD(rank=2, num_iters_per_step=1)):
        trainee = FunctionTrainee(config, "float64")
        states = [reference.State() for _ in range(hvd.size())]
        # Not more: from the noise that fills the memory then, each step takes rounding 100 times farther.
        for step in range(6):
            gradients = [cases.gradients(step, w, "float64") for w in range(hvd.size())]
            for g in gradients:
                g["linear"] *= not 2 <= step < 4
            expected = reference.simulate(gradients, states, config, trailing_columns)[0]
            # While the memory empties, what is sent gets small; it counts beside the gradients.
            usual = cases.gradients(0, 0, "float64")
            cases.assert_close(trainee.exchange(gradients[hvd.rank()]), expected, 1e-9, (config, step), usual)
        # Only zeros from the first step on: nothing to start from but the spare columns.
        trainee = FunctionTrainee(config)
        for step in range(6):
            gradients = cases.gradients(step, hvd.rank(), "float32")
            gradients["linear"] *= step >= 3
            assert (np.linalg.norm(trainee.exchange(gradients)["linear"]) > 0) == (step >= 3)


def check_finite_gradients_of_any_size_and_rank_stay_finite():
    rng = np.random.default_rng(hvd.rank())
    row, column = rng.standard_normal(64), rng.standard_normal(48)
    kinds = {
        "huge": 1e30 * rng.standard_normal((48, 64)),
        "denormal": 1e-42 * rng.standard_normal((48, 64)),
        "of_rank_1": np.outer(column, row),
        "equal_columns": np.repeat(column[:, None], 64, axis=1),
        "one_element": np.eye(48, 64, 7) * (np.arange(64) == 9),
        "zero": np.zeros((48, 64)),
    }
    for config in (PowerSGD(rank=4), PowerSGD(rank=4, num_iters_per_step=1)):
        trainee = FunctionTrainee(config, shapes=dict.fromkeys(kinds, (48, 64)))
        for step in range(4):
            gradients = {kind: (matrix * (step != 2)).astype("float32") for kind, matrix in kinds.items()}
            for kind, update in trainee.exchange(gradients).items():
                assert np.isfinite(update).all(), (kind, step)
            assert all(np.isfinite(memory).all() for memory in trainee.state().memory.values())
            assert all(0 <= tensor.residual <= 1 for tensor in trainee.stats().tensors)
        assert trainee.state().steps == 4


def check_sum_is_workers_times_the_mean():
    mean, total = EagerTrainee(PowerSGD(rank=2)), EagerTrainee(PowerSGD(rank=2), op=hvd.Sum)
    for step in range(3):
        gradients = cases.gradients(step, hvd.rank(), "float32")
        means = mean.exchange(gradients)
        expected = {name: np.asarray(update * np.float32(hvd.size())) for name, update in means.items()}
        cases.assert_close(total.exchange(gradients), expected, 1e-5, step)


def check_groups_and_predivision_change_nothing_but_the_messages():
    plain = EagerTrainee(PowerSGD(rank=2))
    by_list = EagerTrainee(PowerSGD(rank=2))
    variables = by_list.variables
    by_list._options = dict(groups=[[variables["conv"], variables["vector"]], [variables["tall"]]])
    # With two workers, a factor of two may stand for their number.
    others = [EagerTrainee(PowerSGD(rank=2), gradient_predivide_factor=2.0)]
    if hvd.size() <= 2:
        others += [by_list, EagerTrainee(PowerSGD(rank=2), groups=3), KerasTrainee(PowerSGD(rank=2), groups=2)]
    for step in range(3):
        gradients = cases.gradients(step, hvd.rank(), "float32")
        expected = plain.exchange(gradients)
        for other in others:
            cases.assert_close(other.exchange(gradients), expected, 1e-4, step)
