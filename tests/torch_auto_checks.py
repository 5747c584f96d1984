"""hvd.Auto in the workers of a job: choices that are made for it, and its own."""

import contextlib
import copy
import time
from unittest import mock

import numpy as np
import pytest
import torch

import cases
import horovod_powersgd.torch as hvd
from choices import PLAIN, choosing, looking_again, mean_gradients, short_tries
from horovod_powersgd import Auto, PowerSGD, TopK
from horovod_powersgd.calibration import BLOCK
from horovod_powersgd.choosing import Choice
from horovod_powersgd.cost import Work
from horovod_powersgd.network import Curve, Network
from horovod_powersgd.torch import orthogonalization
from horovod_powersgd.torch.auto_engine import AutoEngine
from horovod_powersgd.torch.calibration import Calibration
from measured_plan import plan_is_measured
from trainee import DEVICE, Trainee

AUTO = Auto(PowerSGD(rank=2, min_compression_rate=1), hvd.Compression.fp16, TopK(0.1), PowerSGD(rank=1))
# While one of these is entered, gradients that travel as they are leave in one message, or one by one, from the second
# step on.
together, one_by_one = (mock.patch("horovod_powersgd.torch.direct_exchange.CYCLE", cycle) for cycle in (1e9, -1.0))


def leave_together(optimizer):
    """Whether the gradients of its last step, which travelled as they are, left in one message."""
    direct = optimizer._engine._direct
    return direct._means is direct._joint


def gradients(step, dtype="float32"):
    return cases.gradients(step, hvd.rank(), dtype)


def mean_memory(trainee):
    """The mean of all workers' memories, of all candidates' gradients."""
    engine, found = trainee.optimizer._engine, {}
    for some in engine._gradient_sets:
        for gradient in some:
            if getattr(gradient, "memory", None) is not None:
                found[gradient.name] = found.get(gradient.name, 0) + gradient.memory.cpu().numpy()
    everyone = hvd.allgather_object(found)
    return {name: np.mean([mine[name] for mine in everyone], axis=0) for name in found}


def check_no_gradient_is_lost_whatever_is_chosen():
    trainee, dtype = Trainee(AUTO, "float64"), "float64"
    script = [PLAIN, Choice(0), Choice(0), Choice(2), Choice(0, frozenset({"linear"})), Choice(3), PLAIN, Choice(0)]
    given, taken, chosen = {}, {}, []
    with choosing(*script):
        for step in range(len(script) + 3):
            chosen.append(trainee.optimizer._engine._choice)
            updates = trainee.exchange(gradients(step, dtype))
            means = mean_gradients(step, hvd.size(), dtype)
            for name, mean in means.items():
                given[name], taken[name] = given.get(name, 0) + mean, taken.get(name, 0) + updates[name]
            if chosen[-1] == PLAIN:
                cases.assert_close(updates, means, 1e-9, step)
    assert len(set(chosen)) == len(set(script))
    for name, memory in mean_memory(trainee).items():
        assert cases.error(taken[name] + memory.reshape(taken[name].shape), given[name]) < 1e-9, name


def check_halves_are_horovods_fp16():
    # Another check may have left Horovod a tensor with a name of cases.SHAPES.
    shapes = {f"halves.{name}": shape for name, shape in cases.SHAPES.items()}
    ours, theirs = (Trainee(compression, shapes=shapes) for compression in (AUTO, hvd.Compression.fp16))
    with choosing(Choice(1)):
        for step in range(6):
            mine = cases.gradients(step, hvd.rank(), "float32", shapes)
            with together if step < 3 else one_by_one:
                cases.assert_close(ours.exchange(mine), theirs.exchange(mine), 2**-9, step)
            assert leave_together(ours.optimizer) == (step <= 3)
    assert ours.stats().ratio == 2


def check_the_first_factors_of_a_candidate_do_not_overflow():
    auto = Auto(PowerSGD(rank=2, min_compression_rate=1, wire_dtype="float16"))
    shapes = {f"large.{name}": cases.SHAPES[name] for name in ("linear", "tall")}
    trainee = Trainee(auto, shapes=shapes)
    with choosing(PLAIN, Choice(0)):
        for step in range(5):
            mine = cases.gradients(step, hvd.rank(), "float32", shapes)
            updates = trainee.exchange({name: 1e7 * array for name, array in mine.items()})
            assert all(np.isfinite(update).all() for update in updates.values()), step
    assert trainee.optimizer._engine._choice == Choice(0)


def check_sparse_missing_and_shared_gradients_travel_as_they_are():
    embedding = torch.nn.Embedding(20, 4, sparse=True, device=DEVICE)
    weight = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16, device=DEVICE))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([embedding.weight, weight], lr=1.0),
        [("embedding", embedding.weight), ("weight", weight)],
        compression=AUTO,
        sparse_as_dense=True,
    )
    start = embedding.weight.detach().clone()
    with choosing():
        for step in range(6):
            optimizer.zero_grad()
            with together if step < 3 else one_by_one:
                if hvd.rank() == 0:
                    (embedding(torch.tensor([3, 3], device=DEVICE)).sum() + (weight + weight).sum()).backward()
                optimizer.step()
            assert embedding.weight.grad.is_sparse == (hvd.rank() == 0)  # where there was none, zeros are dense
            assert leave_together(optimizer) == (step <= 3)
    changed = torch.zeros_like(start)
    changed[3] = 6 * 2 / hvd.size()
    torch.testing.assert_close(start - embedding.weight.detach(), changed)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1 - 6 * 2 / hvd.size()))
    assert optimizer.compression_stats().bytes_sent == 4 * (20 * 4 + 6 * 4)


def check_sparse_gradients_are_gathered_whatever_is_chosen():
    embedding = torch.nn.Embedding(300, 8, sparse=True, device=DEVICE)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(embedding.parameters(), lr=1.0), [("gathered", embedding.weight)], compression=AUTO
    )
    start = embedding.weight.detach().clone()
    with choosing(PLAIN, Choice(1), Choice(0)):
        for step in range(6):
            optimizer.zero_grad()
            if hvd.rank() > 0 or step % 2:
                embedding(torch.tensor([hvd.rank(), 10 + step], device=DEVICE)).sum().backward()
            optimizer.step()
            assert embedding.weight.grad.is_sparse and embedding.weight.grad.sparse_dim() == 1
            assert 0 < embedding.weight.grad._nnz() <= 2 * hvd.size()
            rows = 2 if hvd.rank() > 0 or step % 2 else 0
            stats = optimizer.compression_stats()
            assert stats.bytes_sent == rows * (8 + 4 * 8) and stats.tensors[0].reason == "sparse", step
    assert optimizer._engine._choice == Choice(0)
    changed = torch.zeros_like(start)
    for step in range(6):
        changed[10 + step] = hvd.size() - (step % 2 == 0)
    changed[: hvd.size()] = 6
    changed[0] = 3
    torch.testing.assert_close(start - embedding.weight.detach(), changed / hvd.size())


def check_what_is_gathered_or_frozen_is_not_predicted():
    linear = torch.nn.Linear(30, 20, device=DEVICE)
    for with_linear in (True, False):
        embedding = torch.nn.Embedding(300, 8, sparse=True, device=DEVICE)
        named = [(f"predicted.{with_linear}.embedding", embedding.weight)]
        if with_linear:
            named += [("predicted.weight", linear.weight), ("predicted.bias", linear.bias.requires_grad_(False))]
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter for _, parameter in named], lr=0.1), named, compression=AUTO
        )
        with short_tries:
            for _ in range(20):  # of short steps, up to ten are told of together
                optimizer.zero_grad()
                loss = embedding(torch.tensor([1, 2], device=DEVICE)).sum()
                (loss + linear.weight.sum() if with_linear else loss).backward()
                optimizer.step()
        chooser = optimizer._engine._chooser
        assert chooser.predicted and chooser.shapes == ({"predicted.weight": (20, 30)} if with_linear else {})


def check_parameters_that_come_later_are_chosen_for_too():
    body, head = (torch.nn.Linear(40, 40, device=DEVICE) for _ in range(2))
    hvd.broadcast_parameters({**body.state_dict(prefix="body."), **head.state_dict(prefix="head.")}, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(head.parameters(), lr=0.01),
        [*head.named_parameters("later.head"), *body.named_parameters("later.body")],
        compression=AUTO,
    )
    with short_tries:
        for step in range(60):
            if step == 30:
                assert len(optimizer._engine._chooser.shapes) == 2
                optimizer.add_param_group({"params": list(body.parameters())})
            optimizer.zero_grad()
            head(body(torch.randn(8, 40, device=DEVICE))).square().mean().backward()
            optimizer.step()
    chooser = optimizer._engine._chooser
    assert len(chooser.shapes) == 4 and chooser.predicted
    hvd.assert_replicas_equal(torch.nn.Sequential(body, head))


def check_gradients_leave_together_where_they_come_at_once_on_all_workers():
    model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Identity(), torch.nn.Linear(10, 5)).to(DEVICE)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), compression=AUTO
    )
    left_together, pause = [], 0.0
    model[1].register_full_backward_pre_hook(lambda *_: time.sleep(pause))
    with choosing(), mock.patch("horovod_powersgd.torch.direct_exchange.CYCLE", 1.0):
        for step in range(7):
            pause = 1.1 if hvd.rank() == 0 and step == 3 else 0.0
            optimizer.zero_grad()
            model(torch.randn(8, 20, device=DEVICE)).square().mean().backward()
            left = len(optimizer._engine._direct._joint._handles)
            optimizer.step()
            left_together.append(leave_together(optimizer))
            assert step == 0 or left == left_together[-1]  # with the last gradient, not in step()
    # A step leaves as the gradients of the one before have come, to the slowest worker.
    assert left_together == [True] * 4 + [False] + [True] * 2, left_together
    hvd.assert_replicas_equal(model)


def check_sums_are_right_whatever_changes_between_two_steps():
    numbers = {"frozen": 1, "half": 2, "double": 3, "shared": 4, "sharing": 4}
    model = {name: torch.nn.Parameter(torch.zeros(6, device=DEVICE)) for name in numbers}
    model["half"].data = model["half"].data.half()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.values(), lr=1.0), model.items(), compression=AUTO, op=hvd.Sum
    )
    everyone, expected = range(1, hvd.size() + 1), dict.fromkeys(numbers, 0)
    failing = {4: "joint_means", 10: "direct_means"}
    with choosing():
        for step in range(12):
            if step in (3, 9):
                model["double"].data = model["double"].data.to(torch.float64 if step == 3 else torch.float32)
            model["frozen"].requires_grad = step % 3 != 1
            optimizer.zero_grad()
            losses = {name: number * model[name].sum() for name, number in numbers.items()}
            if hvd.rank() == 0:  # the gradients of both are one tensor
                both = model["shared"].view(2, 3) + model["sharing"].view(2, 3)
                losses["shared"] = (torch.full_like(both, 4) * both).sum()
                del losses["sharing"]
            elif hvd.rank() == 1:
                del losses["sharing"]
            with together if step < 6 else one_by_one:
                ((hvd.rank() + 1) * sum(losses.values())).backward()
                if hvd.rank() == 0:
                    assert model["shared"].grad.data_ptr() == model["sharing"].grad.data_ptr()
                if step in failing:
                    waiting = f"horovod_powersgd.torch.{failing[step]}.synchronize"
                    with mock.patch(waiting, side_effect=RuntimeError("no answer")):
                        pytest.raises(RuntimeError, optimizer.step).match("no answer")
                    assert optimizer._engine._direct._packed is None  # what is still on its way is nobody's any more
                    pytest.raises(RuntimeError, optimizer.step).match("exchange of this step has failed")
                else:
                    optimizer.step()
            for name, number in numbers.items():
                if step not in failing and model[name].requires_grad:
                    workers = [worker for worker in everyone if name != "sharing" or worker != 2]
                    expected[name] -= number * sum(workers)
                rounding = 2**-9 if name == "half" else 1e-6
                assert model[name].tolist() == pytest.approx([expected[name]] * 6, rel=rounding), (step, name)
            assert leave_together(optimizer) == (step <= 6), step


def check_a_step_that_fails_in_backward_leaves_nothing_to_the_next_one():
    weights = [torch.nn.Parameter(torch.zeros(6, device=DEVICE)) for _ in range(2)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(weights, lr=1.0), compression=AUTO, op=hvd.Sum)
    with choosing():
        for step in range(8):
            optimizer.zero_grad()
            loss = (hvd.rank() + 1) * sum((number + step) * weight.sum() for number, weight in enumerate(weights))
            with together if step < 4 else one_by_one:
                if step in (2, 6):
                    start = f"horovod_powersgd.torch.{'joint' if step == 2 else 'direct'}_means.allreduce_async_"
                    with mock.patch(start, side_effect=RuntimeError("no memory")):
                        pytest.raises(RuntimeError, loss.backward).match("no memory")
                    pytest.raises(RuntimeError, optimizer.step).match("exchange of this step has failed")
                else:
                    loss.backward()
                    optimizer.step()
    steps, total = [0, 1, 3, 4, 5, 7], hvd.size() * (hvd.size() + 1) / 2
    for number, weight in enumerate(weights):
        assert weight.tolist() == pytest.approx([-total * sum(number + step for step in steps)] * 6)


def check_statistics_say_what_was_chosen():
    trainee = Trainee(AUTO)
    with choosing(PLAIN, Choice(0, frozenset({"linear"}))):
        for step in range(4):
            trainee.exchange(gradients(step))
            if step == 0:
                assert {t.chosen for t in trainee.stats().tensors} == {"none"}
                assert trainee.stats().bytes_sent == trainee.stats().bytes_uncompressed
    by_name = {tensor.name: tensor for tensor in trainee.stats().tensors}
    assert by_name["linear"].chosen == "none" and "longer" in by_name["linear"].reason
    others = [tensor for tensor in by_name.values() if tensor.compressed]
    assert others and {tensor.chosen for tensor in others} == {repr(AUTO.candidates[0])}
    assert trainee.stats().bytes_sent < trainee.stats().bytes_uncompressed


def check_a_saved_choice_goes_on():
    dtype = "float64"
    with choosing(PLAIN, Choice(0, frozenset({"linear"}))):
        whole = Trainee(AUTO, dtype)
        for step in range(5):
            whole.exchange(gradients(step, dtype))
        saved = copy.deepcopy(whole.optimizer.compression_state_dict())
    with choosing():
        resumed = Trainee(AUTO, dtype)
        resumed.optimizer.load_compression_state_dict(saved)
        for step in range(5, 8):
            expected = whole.exchange(gradients(step, dtype))
            cases.assert_close(resumed.exchange(gradients(step, dtype)), expected, 1e-9, step)
        assert resumed.optimizer._engine._choice == Choice(0, frozenset({"linear"}))


def check_a_saved_choice_is_one_of_any_order_and_what_it_does_not_keep_is_saved_too():
    def memories(trainee, number):
        gradients = trainee.optimizer._engine._gradient_sets[number]._compressed()
        return {g.name: g.memory for g in gradients if g.memory is not None and g.memory.any()}

    power, halves, top, _ = AUTO.candidates
    with choosing(PLAIN, Choice(0), Choice(0), Choice(2), Choice(0), Choice(1)):
        whole = Trainee(AUTO)
        for step in range(8):
            whole.exchange(gradients(step))
        saved = copy.deepcopy(whole.optimizer.compression_state_dict())
    kept = memories(whole, 0)
    assert len(kept) == 5 and whole.optimizer._engine._choice == Choice(1)
    left = memories(whole, 2)
    assert left.keys() == {"row"}  # which rank 2 does not compress
    with choosing(PLAIN, Choice(0)):
        other = Trainee(Auto(top, power, hvd.Compression.fp16))
        for step in range(4):
            other.exchange(gradients(step))
        other.optimizer.load_compression_state_dict(saved)
    assert other.optimizer._engine._choice == Choice(2)
    for number, of_whole in ((1, kept), (0, left)):  # and nothing of its own steps
        found = memories(other, number)
        assert found.keys() == of_whole.keys() and all(torch.equal(found[name], of_whole[name]) for name in found)
    # Of three workers' halves, which two are added first depends on what travels in one message.
    with choosing(), together:
        for step in range(8, 10):
            cases.assert_close(other.exchange(gradients(step)), whole.exchange(gradients(step)), 1e-6, step)
    assert Auto(power).number_of(halves.description()) is None
    alone = Trainee(Auto(power))
    alone.optimizer.load_compression_state_dict(saved)
    assert alone.optimizer._engine._choice == PLAIN  # what was chosen is none of its candidates
    pytest.raises(ValueError, alone.optimizer.load_compression_state_dict, []).match("states of all workers are needed")


def check_all_workers_choose_alike_from_what_they_measure():
    slow, calibrations = Curve(((0, 1e-2), (1e6, 1.0))), []

    def calibrate(self):
        calibrations.append(self)
        return Network(hvd.size(), slow, slow, slow, slow), [Work(1e-5, 1e-10)] * len(AUTO.candidates)

    as_if_slow = mock.patch.object(AutoEngine, "_calibrate", calibrate)
    as_it_is = contextlib.nullcontext()
    # Measured and predicted on this machine, and as on a network that is slow, which is looked at again and again.
    for patch, tries in ((as_it_is, short_tries), (as_if_slow, short_tries), (as_if_slow, looking_again)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Tanh(), torch.nn.Linear(100, 50)).to(DEVICE)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), compression=AUTO
        )
        chosen = []
        with patch, tries:
            for _ in range(25 if tries is short_tries else 50):
                optimizer.zero_grad()
                model(torch.randn(8, 200, device=DEVICE)).square().mean().backward()
                drawn = torch.get_rng_state()
                optimizer.step()
                assert torch.equal(torch.get_rng_state(), drawn)  # what is measured draws from others
                chosen.append(optimizer._engine._choice)
        assert chosen[0] == PLAIN
        everyones = hvd.allgather_object(chosen)
        assert all(theirs == chosen for theirs in everyones)
        chooser = optimizer._engine._chooser
        assert PLAIN in chooser.predicted and chooser.measured.keys() <= chooser.predicted.keys()
        if tries is short_tries:
            assert PLAIN in chooser.measured
        hvd.assert_replicas_equal(model)
        if patch is as_if_slow:
            assert len(set(chosen)) > 1  # something else was tried
    assert len(calibrations) > 2


def check_what_is_sent_is_each_workers_own_again():
    calibration = Calibration(hvd.global_process_set, [(64, 64)], device=torch.device(DEVICE))
    nbytes = 2 * (BLOCK + 100)  # of more numbers than are drawn
    message = calibration._message("float16", nbytes)
    own = message.clone()
    everyones = hvd.allgather(own[None, :100], name="everyones")
    assert len(everyones.unique(dim=0)) == hvd.size()
    calibration._average("float16", nbytes)
    np.testing.assert_allclose(message[:100].cpu(), everyones.float().mean(0).cpu(), atol=4e-3)
    calibration._renew("float16", nbytes)
    assert torch.equal(message, own)


def check_factors_that_are_measured_are_as_independent_as_a_jobs():
    calibration = Calibration(hvd.global_process_set, [(64, 64)], device=torch.device(DEVICE))
    with mock.patch.object(orthogonalization, "orthogonalize_by_columns", side_effect=AssertionError("they are not")):
        calibration._step(PowerSGD(rank=4, wire_dtype="int8"), [(300, 200)] * 2, workers=4)()


def check_plan_is_measured():
    plan_is_measured(hvd, "torch")
