"""What users do with hvd.DistributedOptimizer, with PowerSGD on; in every worker of a PyTorch job of several."""

import contextlib
import copy
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import cases
import horovod_powersgd.torch as hvd
from choices import looking_again
from horovod_powersgd import (
    Accordion,
    Auto,
    BestRank,
    GradiVeq,
    Int8,
    PowerSGD,
    RandomK,
    SignNorm,
    Signum,
    TopK,
    reference,
)
from horovod_powersgd.choosing import Chooser
from trainee import Trainee

CONFIG = PowerSGD(rank=2)
ACCORDION = Accordion(PowerSGD(rank=2), PowerSGD(rank=1), interval=4)
GRADIVEQ = GradiVeq(slice_size=16, dimensions=2, learning_steps=3, compressed_steps=5)


def network(seed=0):
    """The same on every worker."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16))


def batch(step, worker=None, rows=8, columns=20):
    """A worker's own."""
    worker = hvd.rank() if worker is None else worker
    return torch.from_numpy(np.random.default_rng([step, worker]).standard_normal((rows, columns)).astype("float32"))


def loss_of(model, step):
    return model(batch(step)).square().mean()


def distribute(model, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), config=CONFIG, **options):
    return hvd.DistributedOptimizer(
        make(model.parameters()), named_parameters=model.named_parameters(), compression=config, **options
    )


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    hvd.assert_replicas_equal(model)


def values(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def check_zero_grad_takes_set_to_none():
    for config in (CONFIG, hvd.Compression.none):
        model = network()
        optimizer = distribute(model, config=config)
        train(model, optimizer, range(1))
        optimizer.zero_grad(set_to_none=False)
        assert all((p.grad == 0).all() for p in model.parameters())
        train(model, optimizer, range(1, 2))
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
        train(model, optimizer, range(2, 3))


def check_a_closure_is_exchanged_each_time_it_is_called():
    for config in (CONFIG, hvd.Compression.none):
        plain, closed = network(), network()
        by_hand, by_closure = distribute(plain, config=config), distribute(closed, config=config)
        train(plain, by_hand, range(3))
        for step in range(3):

            def closure():
                by_closure.zero_grad()
                loss = loss_of(closed, step)
                loss.backward()
                return loss

            assert torch.is_tensor(by_closure.step(closure))
        cases.assert_close(values(closed), values(plain), 1e-6, config)
        hvd.assert_replicas_equal(closed)
    model = network()
    lbfgs = distribute(model, lambda p: torch.optim.LBFGS(p, max_iter=4), PowerSGD(rank=16, min_compression_rate=0))

    def evaluate():
        lbfgs.zero_grad()
        loss = model(batch(0, worker=0)).square().mean()
        loss.backward()
        return loss

    assert lbfgs.step(evaluate) > 2 * lbfgs.step(evaluate)
    hvd.assert_replicas_equal(model)


def check_clipping_between_synchronize_and_step():
    model = network()
    optimizer = distribute(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        clipped = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()
        assert norm > 1e-3 and abs(clipped - 1e-3) < 1e-6
        with optimizer.skip_synchronize():
            optimizer.step()
    hvd.assert_replicas_equal(model)


def check_a_scheduler_sets_the_learning_rate():
    model = network()
    optimizer = distribute(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(2):
        train(model, optimizer, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


def check_accordion_sees_what_a_scheduler_does():
    model = network()
    config = Accordion(PowerSGD(rank=2), PowerSGD(rank=1), threshold=1e9, interval=2)
    optimizer = distribute(model, config=config)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[6, 9], gamma=0.1)
    for step in range(12):
        train(model, optimizer, [step])
        scheduler.step()
    # Low where there is nothing to compare with and from each decay to the interval's end; no norm differs so much.
    low, high = "low", "high"
    expected = [(0, low), (2, low), (4, high), (6, low), (8, high), (9, low), (10, high)]
    compressed = [tensor for tensor in optimizer.compression_stats().tensors if tensor.compressed]
    assert len(compressed) == 3 and all(list(tensor.decisions) == expected for tensor in compressed)
    assert all(tensor.rank == 1 for tensor in compressed)


def check_algorithm_2_is_an_optimizer():
    for dtype in cases.DTYPES:
        parameters = {
            name: nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for name, shape in cases.SHAPES.items()
        }
        optimizer = hvd.ErrorFeedbackSGD(parameters.values(), lr=0.3, momentum=0.8)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=parameters.items(), compression=CONFIG)
        workers = [
            ({name: np.zeros(shape, dtype) for name, shape in cases.SHAPES.items()}, reference.OptimizerState())
            for _ in range(hvd.size())
        ]
        for step in range(6):
            everyone = [cases.gradients(step, w, dtype) for w in range(hvd.size())]
            reference.lockstep(
                [reference.algorithm_2(x, g, state, CONFIG, 0.3, 0.8) for (x, state), g in zip(workers, everyone)]
            )
            optimizer.zero_grad()
            for name, p in parameters.items():
                (p * torch.from_numpy(everyone[hvd.rank()][name])).sum().backward()
            optimizer.step()
            found = {name: p.detach().numpy().copy() for name, p in parameters.items()}
            largest = cases.tolerance(CONFIG, dtype, hvd.size(), step + 1)
            cases.assert_close(found, workers[0][0], largest, (dtype, step))
    with pytest.raises(ValueError, match="momentum"):
        hvd.ErrorFeedbackSGD(network().parameters(), lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="lr"):
        hvd.ErrorFeedbackSGD(network().parameters(), lr=-1.0)


def check_parameter_groups_of_the_start_and_later_ones():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(groups, lr=0.1, momentum=0.9), named_parameters=model.named_parameters(), compression=CONFIG
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    before = values(model)
    train(model, optimizer, range(1))
    assert (before["4.weight"] == values(model)["4.weight"]).all()
    optimizer.add_param_group({"params": model[4].parameters()})
    assert (optimizer.param_groups[2]["lr"], optimizer.param_groups[2]["momentum"]) == (0.1, 0.9)
    train(model, optimizer, range(1, 3))
    assert (before["4.weight"] != values(model)["4.weight"]).all()
    assert "4.weight" in [tensor.name for tensor in optimizer.compression_stats().tensors]


def check_groups_take_in_parameters_that_come_later():
    for config in (CONFIG, hvd.Compression.none):
        model = network()
        model[2].requires_grad_(False)
        first = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
        optimizer = hvd.DistributedOptimizer(
            first, named_parameters=model.named_parameters(), compression=config, groups=2
        )
        train(model, optimizer, range(2))
        optimizer.add_param_group({"params": model[4].parameters()})
        model[2].requires_grad_(True)
        train(model, optimizer, range(2, 5))


def check_layers_freeze_and_thaw():
    for config in (CONFIG, hvd.Compression.none):
        model = network()
        model[2].requires_grad_(False)
        optimizer = distribute(model, config=config)
        start = values(model)
        train(model, optimizer, range(2))
        assert (start["2.weight"] == values(model)["2.weight"]).all()
        model[2].requires_grad_(True)
        train(model, optimizer, range(2, 4))
        thawed = values(model)
        assert (start["2.weight"] != thawed["2.weight"]).any()
    # And once more, with a memory that waits.
    model = network()
    optimizer = distribute(model)
    train(model, optimizer, range(2))
    model[2].requires_grad_(False)
    optimizer.zero_grad()
    frozen = values(model)
    train(model, optimizer, range(2, 4))
    assert (frozen["2.weight"] == values(model)["2.weight"]).all() and model[2].weight.grad is None
    model[2].requires_grad_(True)
    train(model, optimizer, range(4, 6))


def check_workers_may_lack_gradients():
    trainee = Trainee(CONFIG)
    states = [reference.State() for _ in range(hvd.size())]
    for step in range(6):
        gradients = [cases.gradients(step, w, "float32") for w in range(hvd.size())]
        for w, g in enumerate(gradients):
            for name in ("linear", "vector"):
                if (w + step) % 2 or step == 3:
                    g[name] = np.zeros_like(g[name])
        expected = reference.simulate(gradients, states, CONFIG)[0]
        trainee.optimizer.zero_grad()
        mine = gradients[hvd.rank()]
        terms = [(p * torch.from_numpy(mine[n])).sum() for n, p in trainee.parameters.items() if np.any(mine[n])]
        sum(terms).backward()
        trainee.optimizer.synchronize()
        updates = {name: p.grad.numpy().copy() for name, p in trainee.parameters.items()}
        with trainee.optimizer.skip_synchronize():
            trainee.optimizer.step()
        cases.assert_close(updates, expected, 1e-3, step, cases.gradients(0, 0, "float32"))


def check_sparse_gradients_travel_as_horovods_or_compressed():
    for as_dense in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(50, 16, sparse=True)
        start = embedding.weight.detach().clone()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(embedding.parameters(), lr=1.0),
            named_parameters=embedding.named_parameters(),
            compression=PowerSGD(rank=16, min_compression_rate=0),
            sparse_as_dense=as_dense,
        )
        embedding(torch.tensor([hvd.rank(), 7, 7])).sum().backward()
        optimizer.synchronize()
        assert embedding.weight.grad.is_sparse
        with optimizer.skip_synchronize():
            optimizer.step()
        expected = start.clone()
        for worker in range(hvd.size()):
            for row in (worker, 7, 7):
                expected[row] -= 1 / hvd.size()
        torch.testing.assert_close(embedding.weight.detach(), expected)
        hvd.assert_replicas_equal(embedding)
        # Workers whose batches do not touch the embedding.
        optimizer.zero_grad()
        if hvd.rank() == 0:
            embedding(torch.tensor([3])).sum().backward()
        optimizer.step()
        expected[3] -= 1 / hvd.size()
        torch.testing.assert_close(embedding.weight.detach(), expected)
        hvd.assert_replicas_equal(embedding)
    # And that in the very first step, and in the first one after a warm-up.
    warm = PowerSGD(rank=2, warmup_steps=1)
    for dtype, config in ((torch.float32, CONFIG), (torch.bfloat16, CONFIG), (torch.float32, warm)):
        embedding = nn.Embedding(50, 16, sparse=True, dtype=dtype)
        hvd.broadcast_parameters(embedding.state_dict(), root_rank=0)
        optimizer = distribute(embedding, lambda p: torch.optim.SGD(p, lr=1.0), config=config)
        start = embedding.weight.detach().clone()
        for _ in range(1 + config.warmup_steps):
            optimizer.zero_grad()
            if hvd.rank() == 0:
                embedding(torch.tensor([3])).sum().backward()
            optimizer.step()
        assert (start != embedding.weight).any(dim=1).nonzero().tolist() == [[3]]
        hvd.assert_replicas_equal(embedding)
        stats = optimizer.compression_stats()
        assert stats.tensors[0].reason == "sparse" and not stats.tensors[0].compressed and stats.ratio == 1
        # One worker's row, and where it is.
        assert stats.bytes_received == 16 * 4 + 8


def check_workers_outside_the_process_set_do_nothing():
    members = hvd.add_process_set(range(hvd.size() - 1))
    for config in (PowerSGD(rank=2, wire_dtype="int8"), CONFIG):
        trainee = Trainee(config, "float64", process_set=members)
        states = [reference.State() for _ in range(hvd.size() - 1)]
        with cases.in_two_rounds():
            for step in range(3):
                gradients = [cases.gradients(step, w, "float64") for w in range(hvd.size())]
                expected = reference.simulate(gradients[:-1], states, config)[0]
                if not members.included():
                    expected = gradients[-1]
                cases.assert_close(trainee.exchange(gradients[hvd.rank()]), expected, 1e-9, step)
    if members.included():
        assert trainee.optimizer.compression_stats().steps == 3
    else:
        with pytest.raises(RuntimeError, match="outside the optimizer's process set"):
            trainee.optimizer.compression_stats()
    hvd.remove_process_set(members)


def check_join_with_uneven_data():
    configs = CONFIG, PowerSGD(rank=2, num_iters_per_step=1), PowerSGD(rank=2, warmup_steps=3), RandomK(0.2), ACCORDION
    for config in configs:
        model = network()
        optimizer = distribute(model, config=config)
        for _ in range(2):
            for step in range(1 + hvd.rank()):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
            last = hvd.join()
            hvd.broadcast_parameters(model.state_dict(), root_rank=last)
            hvd.broadcast_optimizer_state(optimizer, root_rank=last)
            # Those that joined first missed steps, and take their factors from the one that did not.
            train(model, optimizer, range(10, 12))
        assert optimizer.compression_stats().steps == 2 * (hvd.size() + 2)
        # A worker can have no data at all; the others find their factors without it.
        if hvd.rank() != 0:
            loss_of(model, 20).backward()
            optimizer.step()
        hvd.join()


def check_with_auto_workers_join_between_any_two_steps():
    # A worker that has joined cannot gather: where a candidate does, nothing is measured then.
    linear, gathering = Auto(PowerSGD(rank=2, min_compression_rate=1), hvd.Compression.fp16), Auto(TopK(0.1))
    promises_nothing = mock.patch.object(Chooser, "_promising", lambda *_: set())
    for config, patch in ((linear, contextlib.nullcontext()), (gathering, promises_nothing)):
        model, chosen = network(), []
        optimizer = distribute(model, config=config)
        with patch, looking_again, mock.patch("horovod_powersgd.torch.auto_engine.PERIOD", 2):
            for number in range(2):
                # In the ones that go on, what is compared is begun after the others' last step, too.
                for step in range(13 + number + 3 * hvd.rank()):
                    if step == 12 + number + 3 * hvd.rank():
                        hvd.join()
                    optimizer.zero_grad()
                    loss_of(model, step).backward()
                    optimizer.step()
                chosen.append(optimizer._engine._choice)
        assert all(theirs == chosen for theirs in hvd.allgather_object(chosen))


def check_gathering_while_a_worker_has_joined_is_refused():
    in_bits = PowerSGD(rank=2, wire_dtype="int8")
    once = contextlib.nullcontext
    for config, rounds in (
        (TopK(0.1), once), (SignNorm(), once), (BestRank(2), once), (in_bits, once), (in_bits, cases.in_two_rounds)
    ):
        with rounds():
            model = network()
            optimizer = distribute(model, config=config)
            train(model, optimizer, range(2))
            if hvd.rank() != 0:
                loss_of(model, 2).backward()
                with pytest.raises(RuntimeError, match="hvd.join.*PowerSGD or RandomK"):
                    optimizer.synchronize()
            hvd.join()
    embedding = nn.Embedding(30, 8, sparse=True)
    optimizer = distribute(embedding, make=lambda p: torch.optim.SGD(p, lr=0.1))
    for step in range(4):
        if step == 3 and hvd.rank() == 0:
            break
        embedding(torch.arange(5)).sum().backward()
        with pytest.raises(RuntimeError, match="sparse_as_dense") if step == 3 else contextlib.nullcontext():
            optimizer.synchronize()
        optimizer.zero_grad()
    hvd.join()


def check_two_optimizers_in_one_process():
    one, two = network(1), network(2)
    first, second = distribute(one), distribute(two, config=PowerSGD(rank=1))
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        (loss_of(one, step) + loss_of(two, step)).backward()
        second.step()
        first.step()
    alone = network(1)
    train(alone, distribute(alone), range(3))
    cases.assert_close(values(one), values(alone), 1e-6, "two optimizers")
    hvd.assert_replicas_equal(one)
    hvd.assert_replicas_equal(two)


def check_broadcast_of_optimizer_state_takes_no_step():
    for wrapped in (False, True):
        model = network(seed=hvd.rank())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.assert_replicas_equal(model)

        def adamw(parameters):
            return torch.optim.AdamW(parameters, lr=0.01 * (1 + hvd.rank()), weight_decay=0.5)

        plain = adamw(model.parameters())
        optimizer = plain
        if wrapped:
            optimizer = distribute(model, lambda p: plain)
        before = values(model)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        # A scheduler that was made for the wrapped optimizer still reaches this one.
        assert optimizer.param_groups[0] is plain.param_groups[0]
        assert all((before[name] == value).all() for name, value in values(model).items())
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.01
        if hvd.rank() == 0:
            # Only worker 0 has a state, as after loading a checkpoint there.
            elsewhere = network()
            other = adamw(elsewhere.parameters())
            loss_of(elsewhere, 0).backward()
            other.step()
            optimizer.load_state_dict(other.state_dict())
        hvd.broadcast_parameters(dict(model.named_parameters()), root_rank=0)
        before = values(model)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        assert all((before[name] == value).all() for name, value in values(model).items())
        state = optimizer.state[model[0].weight]
        assert state["step"] == 1 and state["exp_avg"].abs().sum() > 0
        hvd.assert_replicas_equal({k: v for k, v in state.items()})
        if wrapped:
            train(model, optimizer, range(2))


def check_parameters_of_integers_stay_out():
    model = network()
    model.counts = nn.Parameter(torch.zeros(3, 50, dtype=torch.int32), requires_grad=False)
    optimizer = distribute(model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    # As Horovod's, with zeros where there were no gradients.
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad) and model.counts.grad is None
    train(model, optimizer, range(2))


def check_broadcast_of_any_dtype_and_memory_format():
    for make in (
        lambda: torch.full((2, 3, 4, 5), float(hvd.rank())).to(memory_format=torch.channels_last),
        lambda: torch.full((3, 4), float(hvd.rank()), dtype=torch.bfloat16),
        lambda: torch.full((3, 4), hvd.rank(), dtype=torch.int16).t(),
        lambda: torch.tensor(hvd.rank() == 0),
    ):
        tensor = make()
        strides = tensor.stride()
        hvd.broadcast_parameters([("tensor", tensor)], root_rank=0)
        assert tensor.stride() == strides and (tensor == (1 if tensor.dtype == torch.bool else 0)).all()
    with pytest.raises(ValueError, match="invalid params"):
        hvd.broadcast_parameters("model", root_rank=0)


def check_a_checkpoint_is_the_wrapped_optimizers():
    model = network()
    optimizer = distribute(model)
    train(model, optimizer, range(2))
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    loaded = distribute(model)
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(
        loaded.state[model[0].weight]["momentum_buffer"], optimizer.state[model[0].weight]["momentum_buffer"]
    )
    assert type(optimizer).__name__ == "SGD" and isinstance(optimizer, torch.optim.SGD)


def check_half_precision_parameters():
    for dtype, config in itertools.product((torch.float16, torch.bfloat16), (CONFIG, Int8())):
        exact, half = Trainee(config), Trainee(config, str(dtype)[6:])
        for step in range(4):
            gradients = cases.gradients(step, hvd.rank(), "float32")
            rounded = {name: torch.from_numpy(g).to(dtype) for name, g in gradients.items()}
            expected = exact.exchange({name: g.float().numpy() for name, g in rounded.items()})
            half.optimizer.zero_grad()
            sum((p * rounded[name]).sum() for name, p in half.parameters.items()).backward()
            half.optimizer.synchronize()
            hvd.assert_replicas_equal({name: p.grad for name, p in half.parameters.items()})
            updates = {name: p.grad.float().numpy() for name, p in half.parameters.items()}
            assert half.parameters["linear"].grad.dtype == dtype
            cases.assert_close(updates, expected, 4 * torch.finfo(dtype).eps, (dtype, config, step))
            with half.optimizer.skip_synchronize():
                half.optimizer.step()
    overflow = {name: np.full(shape, 4e4, "float32") for name, shape in cases.SHAPES.items()}
    half = Trainee(CONFIG, "float16")
    half.backward({name: g.astype("float16") for name, g in overflow.items()})
    half.optimizer.step()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters.values())
    # A sum that half precision cannot hold is a step that is not finite, and leaves no trace.
    for config in (CONFIG, Int8()):
        half = Trainee(config, "float16", op=hvd.Sum)
        half.backward({name: g.astype("float16") for name, g in overflow.items()})
        half.optimizer.step()
        assert half.state().steps == 0 and not half.state().memory
    with pytest.raises(ValueError, match="complex64"):
        Trainee(CONFIG, "complex64")


def check_results_land_in_gradients_of_any_layout():
    torch.manual_seed(0)
    images = torch.randn(2, 8, 6, 6)

    def conv(memory_format):
        torch.manual_seed(1)
        return nn.Conv2d(8, 16, 3).to(memory_format=memory_format)

    for make in (
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    ):
        usual, last = conv(torch.contiguous_format), conv(torch.channels_last)
        for model, layout in ((usual, torch.contiguous_format), (last, torch.channels_last)):
            optimizer = distribute(model, make)
            for _ in range(3):
                optimizer.zero_grad()
                model(images.to(memory_format=layout)).square().mean().backward()
                gradient, strides = model.weight.grad, model.weight.grad.stride()
                optimizer.step()
                assert model.weight.grad is gradient and gradient.stride() == strides
            hvd.assert_replicas_equal(model)
        torch.testing.assert_close(usual.weight, last.weight.contiguous(), atol=1e-4, rtol=1e-4)

    # A transposed parameter, and a gradient that is one number expanded.
    matrix = torch.from_numpy(cases.gradients(0, hvd.rank(), "float32")["linear"])
    usual, transposed = nn.Parameter(torch.zeros(48, 64)), nn.Parameter(torch.zeros(64, 48).t())
    for parameter in (usual, transposed):
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=1.0), named_parameters=[("linear", parameter)], compression=CONFIG
        )
        (parameter * matrix).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        parameter.grad = torch.ones(()).expand(48, 64)
        optimizer.step()
    assert not transposed.is_contiguous()
    torch.testing.assert_close(usual, transposed)


def check_compiled_models():
    usual, compiled = network(), network()
    train(usual, distribute(usual), range(3))
    optimizer = distribute(compiled)
    faster = torch.compile(compiled, backend="aot_eager")
    for step in range(3):
        optimizer.zero_grad()
        faster(batch(step)).square().mean().backward()
        optimizer.step()
    cases.assert_close(values(compiled), values(usual), 1e-5, "compiled")
    hvd.assert_replicas_equal(compiled)


def check_replicas_that_differ_are_found():
    model = network()
    hvd.assert_replicas_equal(model)
    with torch.no_grad():
        model[2].weight[3, 4] += hvd.rank()
    with pytest.raises(AssertionError, match="2.weight .worker 1 and worker 0"):
        hvd.assert_replicas_equal(model)


def check_mixed_precision_with_a_loss_scale_that_changes():
    scales = [2.0**16, 2.0**16, 2.0**10, 2.0**12, 2.0**12, 2.0**3]
    accordion_of_entries = Accordion(TopK(0.2), TopK(0.1), interval=2)
    for config in (CONFIG, Signum(), GRADIVEQ, accordion_of_entries, Int8()):
        plain, scaled = network(), network()
        by_hand, optimizer = distribute(plain, config=config), distribute(scaled, config=config)
        scaler = torch.amp.GradScaler("cpu", growth_interval=10**6)
        scaler.scale(torch.zeros(1))  # from now on its scale can be set
        optimizer.follow_loss_scale(scaler)
        for step, scale in enumerate(scales):
            train(plain, by_hand, [step])
            scaler.update(new_scale=scale)
            optimizer.zero_grad()
            scaler.scale(loss_of(scaled, step)).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            cases.assert_close(values(scaled), values(plain), 1e-5, (config, step))
        hvd.assert_replicas_equal(scaled)


def check_an_optimizer_that_knows_its_learning_rate_by_itself():
    model = network()
    optimizer = distribute(model)
    optimizer.param_groups[0]["lr"] = None
    loss_of(model, 0).backward()
    optimizer.synchronize()
    assert optimizer.compression_stats().steps == 1


def check_a_step_with_infinity_on_one_worker_is_skipped_by_all():
    model = network()
    optimizer = distribute(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer.follow_loss_scale(scaler)
    skipped = 0
    for step in range(6):
        before, state = values(model), optimizer.compression_state_dict()
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step in (0, 3) and hvd.rank() == hvd.size() - 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        after = optimizer.compression_state_dict()
        same = all((before[name] == value).all() for name, value in values(model).items())
        assert same == (step in (0, 3))
        if same:
            skipped += 1
            assert after["steps"] == state["steps"]
            for name, tensor in state["tensors"].items():
                if "factor" in tensor:
                    assert torch.equal(after["tensors"][name]["factor"], tensor["factor"])
                    if tensor["memory"] is None:
                        assert after["tensors"][name]["memory"] is None
                    else:
                        assert torch.equal(after["tensors"][name]["memory"], tensor["memory"])
    assert skipped == 2 and scaler.get_scale() == 2.0**6
    hvd.assert_replicas_equal(model)


def check_a_loaded_state_goes_on_bit_for_bit():
    gathered = Accordion(TopK(0.2), TopK(0.1), interval=4), Signum(), Int8()
    others = ACCORDION, *gathered, GRADIVEQ, PowerSGD(2, refresh_every=4, memory_dtype="bfloat16")
    for config in (CONFIG, PowerSGD(rank=2, num_iters_per_step=1), PowerSGD(rank=1, warmup_steps=12), *others):
        whole = network()
        train(whole, distribute(whole, config=config), range(20))
        first = network()
        optimizer = distribute(first, config=config)
        train(first, optimizer, range(10))
        saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), optimizer.compression_state_dict()))
        train(first, optimizer, range(10, 12))  # what is saved does not change any more
        second = network(seed=5)
        resumed = distribute(second, config=config)
        second.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        resumed.load_compression_state_dict(saved[2])
        train(second, resumed, range(10, 20))
        for name, value in values(whole).items():
            error = cases.error(values(second)[name], value)
            assert error <= cases.largest_error_of_a_repetition(hvd.size()), (config, name)


def check_a_memory_loads_into_one_of_another_precision():
    (name, shape), rank = ("linear", cases.SHAPES["linear"]), hvd.rank()

    def saved(trainee):
        return trainee.optimizer.compression_state_dict()["tensors"][name]["memory"]

    single = Trainee(PowerSGD(rank=2), shapes={name: shape})
    for step in range(3):
        single.exchange(cases.gradients(step, rank, "float32", {name: shape}))
    for dtype, of_torch in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        halves, back = (Trainee(PowerSGD(rank=2, memory_dtype=some), shapes={name: shape}) for some in (dtype, None))
        halves.optimizer.load_compression_state_dict(single.optimizer.compression_state_dict())
        # Rounded once.
        error = (saved(halves) - saved(single)).abs()
        assert (error <= torch.finfo(of_torch).eps * saved(single).abs() + 1e-6).all() and error.max() > 0, dtype
        back.optimizer.load_compression_state_dict(halves.optimizer.compression_state_dict())
        assert torch.equal(saved(back), saved(halves)), dtype
        mine = cases.gradients(3, rank, "float32", {name: shape})
        cases.assert_close(back.exchange(mine), halves.exchange(mine), 1e-6, dtype)


def check_a_state_of_another_number_of_workers_keeps_the_mean_memory():
    trainee = Trainee(CONFIG)
    for step in range(3):
        trainee.exchange(cases.gradients(step, hvd.rank(), "float32"))
    own = trainee.optimizer.compression_state_dict()
    for workers in (1, 2, 3, 5):
        # As many workers as that, of which worker w had w + 1 times this memory.
        states = []
        for w in range(workers):
            state = copy.deepcopy(own)
            state.update(workers=workers, worker=w)
            for tensor in state["tensors"].values():
                if "memory" in tensor:
                    tensor["memory"] *= w + 1
            states.append(state)
        loaded = Trainee(CONFIG)
        loaded.optimizer.load_compression_state_dict(iter(states))
        mine = {name: memory for name, memory in loaded.state().memory.items()}
        everyone = hvd.allgather_object(mine, name=f"memories of {workers}")
        means = hvd.allgather_object(trainee.state().memory["linear"], name="own")
        zero = np.zeros_like(means[0])
        found = sum(memory.get("linear", zero) for memory in everyone) / hvd.size()
        expected = sum(
            sum((w + 1) * means[holder] for w in range(holder, workers, hvd.size())) for holder in range(hvd.size())
        ) / workers
        assert cases.error(found, expected.astype("float32")) < 1e-6
        assert (loaded.state().factors["linear"].array == trainee.state().factors["linear"].array).all()
        # One state serves the same worker of as many, and no other.
        for w, state in enumerate(states):
            if (workers, w) == (hvd.size(), hvd.rank()):
                loaded.optimizer.load_compression_state_dict(state)
            else:
                with pytest.raises(ValueError, match="list of all workers' states"):
                    loaded.optimizer.load_compression_state_dict(state)
        if workers > 1:
            with pytest.raises(ValueError, match="all workers"):
                loaded.optimizer.load_compression_state_dict([states[0], *states[:-1]])
            states[1]["steps"] += 1
            with pytest.raises(ValueError, match="not of the same step"):
                loaded.optimizer.load_compression_state_dict(states)
    with pytest.raises(ValueError, match="rank: 2 in the state, 3 here"):
        Trainee(PowerSGD(rank=3)).optimizer.load_compression_state_dict(own)
    with pytest.raises(ValueError, match="linear.*48, 64.*9, 9"):
        Trainee(CONFIG, shapes={**cases.SHAPES, "linear": (9, 9)}).optimizer.load_compression_state_dict(own)
    with pytest.raises(ValueError, match="version"):
        trainee.optimizer.load_compression_state_dict({})
    with pytest.raises(ValueError, match="all workers"):
        trainee.optimizer.load_compression_state_dict([])


def check_workers_that_disagree_are_told_what_differs():
    odd = hvd.rank() == 1

    def seen(config, shapes=cases.SHAPES, dtype="float32", **options):
        trainee = Trainee(config, dtype, shapes, **options)
        with pytest.raises(RuntimeError, match="workers do not agree") as caught:
            trainee.exchange(cases.gradients(0, hvd.rank(), dtype, shapes))
        return str(caught.value)

    assert "worker 1: PowerSGD(rank=3" in seen(PowerSGD(rank=3 if odd else 2))
    assert "seed=9" in seen(PowerSGD(seed=9 if odd else 0))
    assert "NoneCompressor" in seen(hvd.Compression.none if odd else CONFIG)
    shapes = {**cases.SHAPES, "linear": (48, 65)} if odd else cases.SHAPES
    assert "parameter linear" in seen(CONFIG, shapes) and "48, 65" in seen(CONFIG, shapes)
    fewer = {name: shape for name, shape in cases.SHAPES.items() if name != "tall" or not odd}
    assert "worker 1: missing" in seen(CONFIG, fewer)
    assert "float64" in seen(CONFIG, dtype="float64" if odd else "float32")
    for other in (dict(groups=2), dict(sparse_as_dense=True), dict(gradient_predivide_factor=2.0)):
        assert next(iter(other)) in seen(CONFIG, **(other if odd else {}))
    assert "worker 1: Sum" in seen(CONFIG, op=hvd.Sum if odd else hvd.Average)


def check_parameters_may_be_in_another_order_on_each_worker():
    for config in (CONFIG, hvd.Compression.none, TopK(0.2)):
        model, usual = network(), network()
        names = sorted(dict(model.named_parameters()), reverse=hvd.rank() % 2)
        parameters = [model.get_parameter(name) for name in names]
        optimizer = distribute(model, lambda _: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), config)
        train(model, optimizer, range(3))
        train(usual, distribute(usual, config=config), range(3))
        cases.assert_close(values(model), values(usual), 1e-6, config)


def check_two_optimizers_may_meet_their_gradients_in_any_order():
    one, two = network(1), network(2)
    first, second = distribute(one), distribute(two)
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        losses = [loss_of(one, step), loss_of(two, step)]
        for loss in losses if hvd.rank() else reversed(losses):
            loss.backward()
        first.step()
        second.step()
    hvd.assert_replicas_equal(one)
    hvd.assert_replicas_equal(two)


def check_a_worker_that_is_new_takes_steps_and_factors_from_the_others():
    for config in (PowerSGD(rank=2, warmup_steps=2), PowerSGD(rank=2, num_iters_per_step=1), ACCORDION, GRADIVEQ):
        model = network()
        optimizer = distribute(model, config=config)
        train(model, optimizer, range(3))
        if hvd.rank() == hvd.size() - 1:
            # As in a new process.
            state = model.state_dict()
            model = network()
            model.load_state_dict(state)
            optimizer = distribute(model, config=config)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        optimizer._engine.generation = None
        train(model, optimizer, range(3, 6))
        stats = optimizer.compression_stats()
        assert stats.steps == 6
        everyone = hvd.allgather_object([tensor.decisions for tensor in stats.tensors], name="decisions")
        assert all(decisions == everyone[0] for decisions in everyone)
