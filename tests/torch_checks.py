"""What holds in every worker of a PyTorch job, whatever launched it."""

import itertools

import numpy as np
import torch

import cases
import horovod_powersgd.torch as hvd
from documented import random_rows
from equivalence import RUNS, Equivalence
from horovod_powersgd import AllreduceMean, Custom, Int8, PowerSGD, reference
from horovod_powersgd.layout import leading_rows
from trainee import DEVICE, Trainee


def share(runs):
    """One worker takes all. Two take one precision under Gloo and the other under MPI, three half as many, and four a
    quarter, under Gloo other configurations than under MPI."""
    first, every = {1: ((0, 0), 1), 2: ((0, 1), 2), 3: ((1, 2), 4), 4: ((4, 7), 8)}[hvd.size()]
    return runs[first[hvd.mpi_enabled()] :: every]


equivalence = Equivalence(hvd, Trainee, leading_rows, lambda: share(RUNS))
trainees, exchange_all = equivalence.trainees, equivalence.exchange_all


def check_a_run_of_20_steps_equals_the_reference():
    equivalence.a_run_of_20_steps()


def check_one_step_from_an_equal_state_equals_the_reference():
    equivalence.one_step_from_an_equal_state()


def check_averages_in_two_rounds_equal_the_reference():
    with cases.in_two_rounds():
        equivalence.a_run_of_compressors(cases.IN_8_BITS, steps=5)


def check_any_shapes_equal_the_reference():
    equivalence.any_shapes(examples=12 if hvd.size() <= 2 else 6)


def check_the_mean_of_all_workers_is_kept_in_half_precision():
    equivalence.the_mean_of_all_workers_is_kept_in_half_precision()


def check_every_compressor_equals_the_reference():
    equivalence.a_run_of_compressors(share(list(itertools.product(cases.COMPRESSORS, cases.DTYPES))))


def check_accordion_equals_the_reference():
    equivalence.a_run_of_compressors(share(list(itertools.product(cases.ACCORDIONS, cases.DTYPES))))


def running_mean(delta, state):
    """Sends each matrix's mean magnitude, and hands out the mean of those so far."""
    total = state.get("total", np.zeros(1, "float32"))
    total = total + (yield AllreduceMean(abs(delta).mean()[None]))
    state.put("total", total)
    return delta * 0 + total / (state.step + 1), None


def check_a_compressor_of_ones_own_is_a_generator_function():
    in_8_bits = Custom(Int8(block=100).exchange, linear=False)
    for function in (random_rows, Custom(running_mean, error_feedback=False), in_8_bits):
        trainee, states = Trainee(function), [reference.State() for _ in range(hvd.size())]
        for step in range(5):
            gradients = [cases.gradients(step, w, "float32") for w in range(hvd.size())]
            expected = reference.simulate(gradients, states, function)[0]
            cases.assert_close(trainee.exchange(gradients[hvd.rank()]), expected, 1e-5, (function, step))
        memory = states[hvd.rank()].memory
        cases.assert_close(trainee.state().memory, memory, 1e-5, (function, "memory"), expected)


def check_updates_and_parameters_are_the_same_bits_on_all_workers():
    everyone = trainees()
    for step in range(3):
        for _ in exchange_all(everyone, step):
            pass
        hvd.assert_replicas_equal(
            {f"{run} {name}": p.grad for run, t in everyone.items() for name, p in t.parameters.items()}
        )
    hvd.assert_replicas_equal({f"{run} {name}": p for run, t in everyone.items() for name, p in t.parameters.items()})


def check_uncompressed_and_fp16_are_horovods_own():
    import horovod.torch

    # Horovod sums in an order that depends on which tensors share a message: up to rounding, with three workers.
    for compression, rounding in ((hvd.Compression.none, 1e-6), (hvd.Compression.fp16, 2**-9)):
        ours = Trainee(compression)
        parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in cases.SHAPES.items()}
        theirs = horovod.torch.DistributedOptimizer(
            torch.optim.SGD(parameters.values(), lr=1.0),
            named_parameters=[(f"theirs.{name}", p) for name, p in parameters.items()],
            compression=compression,
        )
        for step in range(3):
            gradients = cases.gradients(step, hvd.rank(), "float32")
            updates = ours.exchange(gradients)
            sum((p * torch.from_numpy(np.asarray(gradients[name]))).sum() for name, p in parameters.items()).backward()
            theirs.step()
            for name, parameter in parameters.items():
                assert cases.error(updates[name], parameter.grad.numpy()) <= (rounding if hvd.size() > 2 else 0)
            theirs.zero_grad()


def check_bytes_are_those_of_the_factors_and_vectors():
    trainee = Trainee(PowerSGD(rank=2, warmup_steps=1))
    numbers = {name: int(np.prod(shape)) for name, shape in cases.SHAPES.items()}
    uncompressed = 4 * sum(numbers.values())
    sides = {"conv": 16 + 72, "linear": 48 + 64, "tall": 200 + 12, "wide": 12 + 200, "square": 32 + 32}
    compressed = 4 * (sum(2 * side for side in sides.values()) + numbers["row"] + numbers["vector"] + 1)
    trainee.exchange(cases.gradients(0, hvd.rank(), "float32"))
    alone = hvd.size() == 1
    warmup = trainee.optimizer.compression_stats()
    assert (warmup.steps, warmup.bytes_sent) == (1, 0 if alone else uncompressed)
    assert warmup.bytes_uncompressed == uncompressed
    assert {t.reason for t in warmup.tensors if t.name in sides} == {"warm-up"}
    trainee.exchange(cases.gradients(1, hvd.rank(), "float32"))
    stats = trainee.optimizer.compression_stats()
    assert (stats.steps, stats.bytes_sent, stats.bytes_uncompressed) == (2, 0 if alone else compressed, uncompressed)
    assert stats.total_bytes_sent == (0 if alone else uncompressed + compressed)
    assert stats.total_bytes_uncompressed == 2 * uncompressed
    assert stats.ratio == (float("inf") if alone else uncompressed / compressed)
    assert stats.total_ratio == (float("inf") if alone else 2 * uncompressed / (uncompressed + compressed))

    by_name = {tensor.name: tensor for tensor in stats.tensors}
    assert list(by_name) == list(cases.SHAPES)
    assert by_name["conv"].shape == (16, 8, 3, 3) and by_name["conv"].matrix_shape == (16, 72)
    assert by_name["conv"].rank == 2 and by_name["conv"].compressed and by_name["conv"].reason is None
    assert not by_name["vector"].compressed and by_name["vector"].reason == "a vector"
    assert not by_name["row"].compressed and "min_compression_rate" in by_name["row"].reason
    assert by_name["vector"].residual == 0


def check_the_residual_is_what_stayed_in_the_memory():
    for config in (PowerSGD(rank=2), PowerSGD(rank=2, num_iters_per_step=1)):
        trainee = Trainee(config)
        assert all(t.residual is None for t in trainee.optimizer.compression_stats().tensors if t.compressed)
        for step in range(3):
            before = trainee.state().memory
            gradients = cases.gradients(step, hvd.rank(), "float32")
            trainee.exchange(gradients)
            after = trainee.state().memory
            for tensor in trainee.optimizer.compression_stats().tensors:
                if tensor.compressed:
                    delta = gradients[tensor.name].reshape(tensor.matrix_shape) + before.get(tensor.name, 0)
                    expected = np.linalg.norm(after[tensor.name]) / np.linalg.norm(delta)
                    assert abs(tensor.residual - expected) < 1e-4 and 0 < tensor.residual < 1


def check_a_step_with_a_number_that_is_not_finite_leaves_no_trace():
    for poisoned, value in (("linear", np.nan), ("conv", np.inf), ("vector", -np.inf)):
        trainee = Trainee(PowerSGD(rank=2))
        for step in range(2):
            trainee.exchange(cases.gradients(step, hvd.rank(), "float32"))
        before = trainee.state()
        gradients = cases.gradients(2, hvd.rank(), "float32")
        if hvd.rank() == hvd.size() - 1:
            gradients[poisoned].flat[5] = value
        updates = trainee.exchange(gradients)
        assert not np.isfinite(updates[poisoned]).all()
        assert all(np.isfinite(update).all() for name, update in updates.items() if name != poisoned)
        after = trainee.state()
        assert after.steps == before.steps == 2
        for name in before.memory:
            assert (after.memory[name] == before.memory[name]).all()
            assert (after.factors[name].array == before.factors[name].array).all()
        updates = trainee.exchange(cases.gradients(3, hvd.rank(), "float32"))
        assert all(np.isfinite(update).all() for update in updates.values())


def check_no_compressor_lets_a_number_pass_that_is_not_finite():
    for config in [*cases.COMPRESSORS, *cases.ACCORDIONS]:
        trainee = Trainee(config)
        for step in range(2):
            trainee.exchange(cases.gradients(step, hvd.rank(), "float32"))
        before = trainee.state()
        gradients = cases.gradients(2, hvd.rank(), "float32")
        if hvd.rank() == hvd.size() - 1:
            gradients["linear"].flat[5] = np.nan
        assert not np.isfinite(trainee.exchange(gradients)["linear"]).all(), config
        after = trainee.state()
        assert after.steps == 2, config
        for name in before.memory:
            np.testing.assert_array_equal(after.memory[name], before.memory[name])
        updates = trainee.exchange(cases.gradients(3, hvd.rank(), "float32"))
        assert trainee.state().steps == 3 and all(np.isfinite(update).all() for update in updates.values()), config


def check_a_layer_recovers_from_gradients_of_zero():
    for config in (PowerSGD(rank=2), PowerSGD(rank=2, num_iters_per_step=1)):
        trainee = Trainee(config, "float64")
        states = [reference.State() for _ in range(hvd.size())]
        # Not more: from the noise that fills the memory then, each step takes rounding 100 times farther.
        for step in range(6):
            gradients = [cases.gradients(step, w, "float64") for w in range(hvd.size())]
            for g in gradients:
                g["linear"] *= not 2 <= step < 4
            expected = reference.simulate(gradients, states, config)[0]
            # While the memory empties, what is sent gets small; it counts beside the gradients.
            usual = cases.gradients(0, 0, "float64")
            cases.assert_close(trainee.exchange(gradients[hvd.rank()]), expected, 1e-9, (config, step), usual)
        # Only zeros from the first step on: nothing to start from but the spare columns.
        trainee = Trainee(config)
        for step in range(6):
            gradients = cases.gradients(step, hvd.rank(), "float32")
            gradients["linear"] *= step >= 3
            updates = trainee.exchange(gradients)
            assert (np.linalg.norm(updates["linear"]) > 0) == (step >= 3)


def check_finite_gradients_of_any_size_and_rank_stay_finite():
    rng = np.random.default_rng(hvd.rank())
    row, column = rng.standard_normal(64), rng.standard_normal(48)
    kinds = {
        "huge": 1e30 * rng.standard_normal((48, 64)),
        "denormal": 1e-42 * rng.standard_normal((48, 64)),
        "of rank 1": np.outer(column, row),
        "equal columns": np.repeat(column[:, None], 64, axis=1),
        "one element": np.eye(48, 64, 7) * (np.arange(64) == 9),
        "zero": np.zeros((48, 64)),
    }
    for kind, matrix in kinds.items():
        for config in (PowerSGD(rank=4), PowerSGD(rank=4, num_iters_per_step=1)):
            trainee = Trainee(config, shapes={"matrix": (48, 64)})
            for step in range(4):
                updates = trainee.exchange({"matrix": (matrix * (step != 2)).astype("float32")})
                assert np.isfinite(updates["matrix"]).all(), (kind, step)
                assert np.isfinite(trainee.state().memory["matrix"]).all(), (kind, step)
                assert 0 <= trainee.optimizer.compression_stats().tensors[0].residual <= 1
            assert trainee.state().steps == 4


def check_a_direction_behind_a_dependent_column_is_not_lost():
    from horovod_powersgd.torch.orthogonalization import orthogonalize

    rng = np.random.default_rng(0)
    first, second = np.eye(30)[0], rng.standard_normal(30)
    for columns in ([0 * first, first], [1e-20 * second, second], [second, 2 * second, first], [first, first, second]):
        matrix = np.stack(columns, axis=1).astype("float32")
        spare = reference.initial_factor("spare", *matrix.shape, 0)
        factor, spares = torch.from_numpy(matrix.T.copy()), [lambda spare=spare: torch.from_numpy(spare.T.copy())]
        basis = orthogonalize([factor], spares)[0].numpy().T
        np.testing.assert_allclose(basis, reference.orthogonalize(matrix, spare), atol=1e-6)
        assert np.linalg.norm(matrix - basis @ (basis.T @ matrix)) < 1e-5


def check_a_gradient_and_its_memory_take_turns_in_two_storages_or_three_where_the_step_can_be_discarded():
    for finish, expected in ((lambda trainee: trainee.optimizer.step(), 2), (Trainee.finish, 3)):
        trainee = Trainee(PowerSGD(rank=2), shapes={"linear": cases.SHAPES["linear"]})
        parameter = trainee.parameters["linear"]
        storages = set()
        for step in range(6):
            trainee.optimizer.zero_grad(set_to_none=False)
            trainee.backward(cases.gradients(step, hvd.rank(), "float32"))
            finish(trainee)
            memory = next(iter(trainee.optimizer._engine._gradients)).memory
            storages |= {parameter.grad.data_ptr(), memory.data_ptr()}
        assert len(storages) == expected, "a copy of the gradient was made"


def check_sum_is_workers_times_the_mean():
    mean, total = Trainee(PowerSGD(rank=2)), Trainee(PowerSGD(rank=2), op=hvd.Sum)
    for step in range(3):
        gradients = cases.gradients(step, hvd.rank(), "float32")
        means = mean.exchange(gradients)
        expected = {name: np.asarray(update * np.float32(hvd.size())) for name, update in means.items()}
        cases.assert_close(total.exchange(gradients), expected, 1e-5, step)


def check_groups_and_predivision_change_nothing_but_the_messages():
    plain = Trainee(PowerSGD(rank=2))
    by_number = Trainee(PowerSGD(rank=2), groups=3)
    predivided = Trainee(PowerSGD(rank=2), gradient_predivide_factor=2.0)
    parameters = {name: torch.nn.Parameter(torch.zeros(shape, device=DEVICE)) for name, shape in cases.SHAPES.items()}
    by_list = Trainee.__new__(Trainee)
    by_list.parameters = parameters
    by_list.optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0),
        named_parameters=parameters.items(),
        compression=PowerSGD(rank=2),
        groups=[[parameters["conv"], parameters["vector"]], [parameters["tall"]]],
    )
    for step in range(3):
        gradients = cases.gradients(step, hvd.rank(), "float32")
        expected = plain.exchange(gradients)
        for other in (by_number, predivided, by_list):
            cases.assert_close(other.exchange(gradients), expected, 1e-4, step)


def check_gradients_accumulate_over_backward_passes():
    whole, parts = Trainee(PowerSGD(rank=2)), Trainee(PowerSGD(rank=2), backward_passes_per_step=2)
    for step in range(3):
        first, second = (cases.gradients(2 * step + i, hvd.rank(), "float32") for i in range(2))
        expected = whole.exchange({name: np.asarray(first[name] + second[name]) for name in first})
        parts.optimizer.zero_grad()
        parts.backward(first)
        parts.backward(second)
        parts.optimizer.synchronize()
        updates = {name: p.grad.cpu().numpy().copy() for name, p in parts.parameters.items()}
        with parts.optimizer.skip_synchronize():
            parts.optimizer.step()
        cases.assert_close(updates, expected, 1e-4, step)


def check_misuse_is_told_as_by_horovod():
    import pytest

    trainee = Trainee(PowerSGD())
    gradients = cases.gradients(0, hvd.rank(), "float32")
    trainee.backward(gradients)
    with pytest.raises(AssertionError, match="zero_grad"):
        trainee.optimizer.zero_grad()
    with pytest.raises(AssertionError, match="backward_passes_per_step"):
        trainee.backward(gradients)
    trainee.optimizer.step()
    assert isinstance(trainee.optimizer, torch.optim.SGD)

    parameter = torch.nn.Parameter(torch.zeros(3, 3))
    for named, match in (
        ([("a", parameter), ("a", parameter)], "unique"),
        ([("a", torch.nn.Parameter(torch.zeros(1)))], "not named"),
        ([parameter], "tuples"),
    ):
        with pytest.raises(ValueError, match=match):
            hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1), named_parameters=named, compression=PowerSGD())
    for options, match in (
        (dict(op=hvd.Adasum), "Adasum"),
        (dict(op=hvd.Sum, gradient_predivide_factor=2.0), "gradient_predivide_factor"),
        (dict(backward_passes_per_step=0), "backward_passes_per_step"),
    ):
        with pytest.raises(ValueError, match=match):
            hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1), compression=PowerSGD(), **options)
    with pytest.raises(TypeError, match="PowerSGD"):
        hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1), compression="powersgd")
