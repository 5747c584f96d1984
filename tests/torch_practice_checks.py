"""What people do around hvd.DistributedOptimizer, as their bug reports tell; in every worker of a PyTorch job."""

import contextlib
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import cases
import horovod_powersgd.torch as hvd
from horovod_powersgd import Accordion, Int8, PowerSGD, RandomK, Signum, TopK
from torch_feature_checks import CONFIG, batch, distribute, loss_of, network, train, values
from trainee import Trainee

EXACT = PowerSGD(rank=64, min_compression_rate=0)
NONE = hvd.Compression.none


def way(model, start):
    return {name: value - start[name] for name, value in values(model).items()}


# Gradients and who else has them


class Tables(nn.Module):
    """Two tables that are added up; as views they get one gradient between them."""

    def __init__(self, as_views, examples):
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(64, 64)
        self.position, self.kind = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(32, 64))
        self.out = nn.Linear(64, 16)
        self.as_views, self.examples = as_views, examples

    def forward(self, step):
        x = torch.tanh(self.below(batch(step, rows=self.examples * 32, columns=64).view(self.examples, 32, 64)))
        if self.as_views:
            x = x + (self.position[None] + self.kind[None])
        else:
            x = x + self.position + self.kind
        return self.out(torch.tanh(x)).square().mean()


def check_gradients_that_share_memory_train_as_those_that_do_not():
    for config in (CONFIG, EXACT, TopK(0.1), NONE):
        for examples in (1, 3):
            ways = []
            for as_views in (False, True):
                model = Tables(as_views, examples)
                start = values(model)
                optimizer = distribute(model, lambda p: torch.optim.SGD(p, lr=0.3), config)
                shared = False
                for step in range(5):
                    optimizer.zero_grad()
                    model(step).backward()
                    one, two = (p.grad.untyped_storage().data_ptr() for p in (model.position, model.kind))
                    shared |= one == two
                    optimizer.step()
                hvd.assert_replicas_equal(model)
                assert shared == as_views
                ways.append(way(model, start))
            cases.assert_close(*ways, 1e-4, (config, examples))


def check_gradients_that_are_parts_of_one_buffer_stay_there():
    for config in (CONFIG, TopK(0.1), Int8(), NONE):
        model, usual = network(), network()
        flat = torch.zeros(sum(p.numel() for p in model.parameters()))
        sizes = [p.numel() for p in model.parameters()]
        parts = [part.view(p.shape) for part, p in zip(flat.split(sizes), model.parameters())]
        optimizer, other = distribute(model, config=config), distribute(usual, config=config)
        for step in range(3):
            flat.zero_()
            for p, part in zip(model.parameters(), parts):
                p.grad = part
            loss_of(model, step).backward()
            optimizer.step()
            other.zero_grad()
            loss_of(usual, step).backward()
            other.step()
            found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            assert torch.equal(flat, found)
        cases.assert_close(values(model), values(usual), 1e-6, config)


def check_a_gradient_that_is_part_of_a_graph_stays_in_it():
    model, usual = network(), network()
    optimizer, other = distribute(model), distribute(usual)
    for step in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss_of(model, step).backward(create_graph=True)
        kept = {name: p.grad for name, p in model.named_parameters()}
        before = {name: g.detach().clone() for name, g in kept.items()}
        optimizer.synchronize()
        assert all(torch.equal(kept[name], g) and kept[name].requires_grad for name, g in before.items())
        # A second graph can still go through them.
        torch.autograd.grad(kept["0.weight"].square().sum(), model[0].weight)
        optimizer.step()
        train(usual, other, [step])
    cases.assert_close(values(model), values(usual), 1e-6, "create_graph")


class Parts(torch.autograd.Function):
    """Hands out a part of what it keeps, as a layer with buffers of its own does."""

    kept = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Parts.kept.append(gradient[None].clone())
        return Parts.kept[-1][0]


def check_what_somebody_else_keeps_of_a_gradient_holds_the_update_as_with_horovod():
    weight = nn.Parameter(torch.zeros(48, 64))
    optimizer = distribute(nn.ParameterDict({"linear": weight}), lambda p: torch.optim.SGD(p, lr=1.0))
    for step in range(3):
        gradient = torch.from_numpy(cases.gradients(step, hvd.rank(), "float32")["linear"])
        optimizer.zero_grad()
        (Parts.apply(weight) * gradient).sum().backward()
        optimizer.step()
        assert torch.equal(Parts.kept.pop()[0], weight.grad)


def check_hooks_of_the_users_come_before_the_exchange_whenever_they_were_registered():
    for config in (EXACT, CONFIG, NONE):
        found = []
        for when in ("before", "after"):
            model = network()
            mask = (torch.arange(24)[:, None] % 2).float()

            def prune(p):
                p.grad.mul_(mask)

            def clip(p):
                p.grad.clamp_(-1e-3, 1e-3)

            def register():
                model[2].weight.register_post_accumulate_grad_hook(prune)
                model[0].weight.register_post_accumulate_grad_hook(clip)

            start = values(model)
            if when == "before":
                register()
            optimizer = distribute(model, config=config)
            if when == "after":
                register()
            train(model, optimizer, range(4))
            found.append(way(model, start))
            assert np.abs(found[-1]["2.weight"][::2]).max() < 1e-6
        cases.assert_close(*found, 1e-5, config)


def check_a_hook_that_takes_the_gradient_away_leaves_it_out():
    model = network()
    start = values(model)
    optimizer = distribute(model)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    train(model, optimizer, range(3))
    moved = way(model, start)
    assert not moved["2.weight"].any() and moved["0.weight"].any()


def check_a_gradient_that_is_changed_while_it_is_exchanged_is_told_of():
    def scale(model):
        model[2].weight.grad.mul_(0.5)

    def replace(model):
        model[2].weight.grad = torch.zeros_like(model[2].weight)

    def drop(model):
        model[2].weight.grad = None

    for change in (scale, replace, drop):
        for first in (0, 2):
            model = network()
            optimizer = distribute(model)
            train(model, optimizer, range(first))
            optimizer.zero_grad()
            loss_of(model, 9).backward()
            change(model)
            with pytest.raises(RuntimeError, match="gradient of 2.weight was changed .* call synchronize.. first"):
                optimizer.step()
            optimizer.zero_grad()
            train(model, optimizer, range(10, 12))


def check_a_gradient_that_a_hook_takes_away_after_it_came_is_told_of():
    for config in (CONFIG, PowerSGD(2, warmup_steps=9), Int8()):
        model = network()
        optimizer = distribute(model, config=config)
        train(model, optimizer, range(2))

        def take_away(parameter, gradients=model[2]):
            gradients.weight.grad = None

        hooks = [parameter.register_post_accumulate_grad_hook(take_away) for parameter in model[0].parameters()]
        optimizer.zero_grad()
        loss_of(model, 9).backward()
        with pytest.raises(RuntimeError, match="gradient of 2.weight was changed .* call synchronize.. first"):
            optimizer.step()
        for hook in hooks:
            hook.remove()
        optimizer.zero_grad()
        train(model, optimizer, range(10, 12))


# Steps that are not taken

COMPRESSORS = [
    CONFIG,
    PowerSGD(2, num_iters_per_step=1),
    PowerSGD(2, error_feedback=False),
    PowerSGD(2, warmup_steps=2),
    PowerSGD(2, wire_dtype="float16"),
    Accordion(PowerSGD(2), PowerSGD(1), interval=2),
    TopK(0.1),
    RandomK(0.1),
    Signum(),
    Int8(),
]


def check_a_step_that_is_not_taken_leaves_no_trace():
    def zero_grad(model, optimizer):
        optimizer.zero_grad()

    def forget(model, optimizer):
        for p in model.parameters():
            p.grad = None

    def ask(model, optimizer):
        before = optimizer.compression_stats().steps
        optimizer.zero_grad()
        assert optimizer.compression_stats().steps == before - 1

    for config in COMPRESSORS:
        clean, *others = (network() for _ in range(4))
        optimizers = [distribute(model, config=config) for model in (clean, *others)]
        for step in range(6):
            train(clean, optimizers[0], [step])
            for model, optimizer, discard in zip(others, optimizers[1:], (zero_grad, forget, ask)):
                optimizer.zero_grad()
                state = optimizer.compression_state_dict()
                (100 * loss_of(model, 50 + step)).backward()
                optimizer.synchronize()
                # What would be saved now is as before.
                unchanged = optimizer.compression_state_dict()
                for name, tensor in state["tensors"].items():
                    assert all(cases_equal(unchanged["tensors"][name][key], tensor[key]) for key in tensor), name
                discard(model, optimizer)
                loss_of(model, step).backward()
                optimizer.step()
        for model in others:
            cases.assert_close(values(model), values(clean), 1e-6, config)


def cases_equal(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(cases_equal(one[key], two[key]) for key in one)
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def check_a_second_synchronize_exchanges_nothing_new():
    for config in (CONFIG, TopK(0.1)):
        usual, twice, without = network(), network(), network()
        optimizers = [distribute(model, config=config) for model in (usual, twice, without)]
        for step in range(4):
            for model, optimizer in zip((usual, twice, without), optimizers):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.synchronize()
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                if model is twice:
                    optimizer.synchronize()
                if model is without:
                    for p in model.parameters():
                        p.grad = p.grad * 1.0
                with optimizer.skip_synchronize() if model is usual else contextlib.nullcontext():
                    optimizer.step()
        sent = [optimizer.compression_stats().total_bytes_sent for optimizer in optimizers]
        assert len(set(sent)) == 1
        cases.assert_close(values(twice), values(usual), 1e-6, config)
        cases.assert_close(values(without), values(usual), 1e-6, config)


def check_other_gradients_than_those_that_were_exchanged_are_exchanged():
    trainee = Trainee(CONFIG)
    for step in range(2):
        gradients = cases.gradients(step, hvd.rank(), "float32")
        for name, p in trainee.parameters.items():
            p.grad = torch.from_numpy(np.asarray(gradients[name]).copy())
        trainee.optimizer.synchronize()
        hvd.assert_replicas_equal({name: p.grad for name, p in trainee.parameters.items()})


def check_one_bad_batch_that_is_clipped_costs_a_step_and_not_many():
    rng = np.random.default_rng(0)
    spectrum = 0.9 ** np.arange(48)
    target = rng.standard_normal((64, 48)) * spectrum @ rng.standard_normal((48, 96))
    target = torch.from_numpy(target.astype("float32"))

    def losses(config, spike):
        weight = nn.Parameter(torch.zeros(64, 96))
        optimizer = distribute(nn.ParameterDict({"weight": weight}), lambda p: torch.optim.SGD(p, lr=0.2), config)
        found = []
        for step in range(61 if spike is None else 67):
            x = batch(step, rows=16, columns=64)
            y = x @ target
            if step == spike:
                y = 1000 * batch(step, rows=16, columns=96) * y.abs().mean()
            optimizer.zero_grad()
            (x @ weight - y).square().mean().backward()
            optimizer.synchronize()
            nn.utils.clip_grad_norm_([weight], 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
            found.append((weight.detach() - target).square().mean().item())
        return found

    for config in (NONE, PowerSGD(4), PowerSGD(4, memory_dtype="bfloat16"), PowerSGD(1), TopK(0.1)):
        usual, spoiled = losses(config, None), losses(config, 60)
        behind = next((i for i in range(61, 67) if spoiled[i] <= usual[60]), 67) - 60
        assert behind <= 5, (config, behind)


def check_what_is_no_bad_batch_keeps_its_memory():
    def scaled(model, optimizer, scaler, step):
        scaler.unscale_(optimizer)
        if step % 3 == 2:  # as people clip who look at the norm first
            for p in model.parameters():
                p.grad.mul_(0.9)
        scaler.step(optimizer)
        scaler.update()

    def multiplied(model, optimizer, scaler, step):
        if step % 4 == 3:
            optimizer.step()
            return
        optimizer.synchronize()
        for p in model.parameters():
            p.grad.mul_(10)
        with optimizer.skip_synchronize():
            optimizer.step()

    for change in (scaled, multiplied):
        model = network()
        optimizer = distribute(model, lambda p: torch.optim.SGD(p, lr=0.0))
        usual = Trainee(CONFIG, shapes={name: tuple(p.shape) for name, p in model.named_parameters()})
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4, enabled=change is scaled)
        for step in range(12):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            change(model, optimizer, scaler, step)
            gradients = torch.autograd.grad(loss_of(model, step), list(model.parameters()))
            usual.exchange({name: g.numpy() for (name, _), g in zip(model.named_parameters(), gradients)})
        found = optimizer.compression_state_dict()["tensors"]
        expected = usual.optimizer.compression_state_dict()["tensors"]
        for name, tensor in expected.items():
            if "memory" in tensor:
                memory = found[name]["memory"] / found[name]["memory_scale"]
                assert cases.error(memory.numpy(), tensor["memory"].numpy()) < 1e-4, (change, name)


def check_an_accumulation_after_a_step_that_was_not_taken_is_exchanged():
    model = network()
    optimizer = distribute(model, backward_passes_per_step=2)
    for step in range(4):
        for batch_of in (2 * step, 2 * step + 1):
            loss_of(model, batch_of).backward()
        if step == 2:
            optimizer.synchronize()
            model.zero_grad()
            loss_of(model, 20).backward()
        optimizer.step()
        optimizer.zero_grad()
        hvd.assert_replicas_equal(model)


def check_a_line_search_comes_to_the_same_decisions_on_all_workers():
    for config in (EXACT, CONFIG, NONE):
        model = network()
        optimizer = distribute(
            model, lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"), config
        )
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        everyone = hvd.allgather_object((calls, losses), name="calls")
        assert all(one == everyone[0] for one in everyone) and losses[-1] < losses[0]
        hvd.assert_replicas_equal(model)


# Loss scales


def check_a_scaler_steps_as_with_one_process():
    def bare(scaler, optimizer, model):
        scaler.step(optimizer)

    def clipped(scaler, optimizer, model):
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)

    def by_the_book(scaler, optimizer, model):
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)

    def by_the_book_clipped(scaler, optimizer, model):
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)

    def trained(config, step_by, make):
        model = network()
        start = values(model)
        optimizer = distribute(model, make, config)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
        for step in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            if step in (0, 5) and hvd.rank() == hvd.size() - 1:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            step_by(scaler, optimizer, model)
            scaler.update()
        hvd.assert_replicas_equal(model)
        scales = hvd.allgather_object(scaler.get_scale(), name="scales")
        assert len(set(scales)) == 1
        return way(model, start)

    def sgd(p):
        return torch.optim.SGD(p, lr=0.1, momentum=0.9)

    for config in (CONFIG, TopK(0.1), NONE):
        for make in (sgd, lambda p: torch.optim.Adam(p, lr=0.01, fused=True)):
            expected = trained(config, by_the_book, sgd) if make is sgd else None
            found = trained(config, bare, make)
            if expected:
                cases.assert_close(found, expected, 1e-5, (config, "bare"))
        cases.assert_close(
            trained(config, clipped, sgd), trained(config, by_the_book_clipped, sgd), 1e-5, (config, "clipped")
        )


# Wrapping


def check_wrapping_keeps_the_optimizer():
    class Counts(torch.optim.SGD):
        def __init__(self, params, wd, **options):
            super().__init__(params, weight_decay=wd, **options)
            self.count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

    for config in (CONFIG, NONE):
        model = network()
        given = Counts(model.parameters(), 0.1, lr=0.1, momentum=0.9)
        given.mine = "mine"
        scheduler = torch.optim.lr_scheduler.StepLR(given, step_size=2, gamma=0.5)
        loss_of(model, 0).backward()
        given.step()
        momentum = given.state[model[0].weight]["momentum_buffer"]
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(given, root_rank=0)
        optimizer = hvd.DistributedOptimizer(given, model.named_parameters(), compression=config)
        assert optimizer is given and isinstance(optimizer, Counts) and optimizer.mine == "mine" and momentum.any()
        assert optimizer.state[model[0].weight]["momentum_buffer"].any()
        later = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(1, 5):
                train(model, optimizer, [step])
                scheduler.step()
                later.step()
        assert optimizer.count == 5 and optimizer.param_groups[0]["lr"] == 0.1 * 0.25
        model, calls = network(), []
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        plain.register_step_post_hook(lambda *_: calls.append("before"))
        optimizer = distribute(model, lambda p: plain, config)
        optimizer.register_step_pre_hook(lambda *_: calls.append("after"))
        train(model, optimizer, range(3))
        assert calls == 3 * ["after", "before"]
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(3, 4))
        assert calls == 4 * ["after", "before"]


def check_an_optimizer_of_a_library_may_have_a_zero_grad_without_arguments():
    class Old(torch.optim.SGD):
        def zero_grad(self):
            for p in self.param_groups[0]["params"]:
                p.grad = None

    for config in (CONFIG, NONE):
        model = network()
        train(model, distribute(model, lambda p: Old(p, lr=0.1), config), range(2))


def check_what_cannot_be_wrapped_is_told_and_left_as_it_was():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, error, match in (
        ((optimizer, PowerSGD(4)), TypeError, "named_parameters.*compression="),
        ((optimizer, [("a", model[0].weight)]), ValueError, "not named"),
        ((model, model.named_parameters()), TypeError, "torch.optim.Optimizer"),
        ((torch.optim.SGD, model.named_parameters()), TypeError, "torch.optim.Optimizer"),
    ):
        with pytest.raises(error, match=match):
            hvd.DistributedOptimizer(*arguments)
    assert type(optimizer) is torch.optim.SGD and "_handles" not in vars(optimizer)
    tensor = torch.ones(3)
    for call in (
        lambda: hvd.allreduce(tensor, PowerSGD(4)),
        lambda: hvd.allreduce(tensor, name="a", compression=PowerSGD(4)),
        lambda: hvd.grouped_allreduce([tensor], PowerSGD(4)),
    ):
        with pytest.raises(TypeError, match="compression= to a DistributedOptimizer"):
            call()
    assert hvd.allreduce(tensor, name="it still works").sum() == 3


def check_a_model_that_is_wrapped_again_goes_on():
    for config in (CONFIG, TopK(0.1), NONE):
        usual = network()
        train(usual, distribute(usual, lambda p: torch.optim.SGD(p, lr=0.1), config), range(6))
        # The same optimizer, as when a notebook's cell runs twice; and a new one.
        for new in (False, True):
            model = network()
            first = optimizer = distribute(model, lambda p: torch.optim.SGD(p, lr=0.1), config)
            train(model, optimizer, range(3))
            base = torch.optim.SGD(model.parameters(), lr=0.1) if new else optimizer
            optimizer = distribute(model, lambda _: base, config)
            train(model, optimizer, range(3, 6))
            cases.assert_close(values(model), values(usual), 1e-6, (config, new))
            if new:
                with pytest.raises(RuntimeError, match="another DistributedOptimizer"):
                    first.step()
        # Where nobody holds the first one any more, nothing is left of it.
        model = network()
        optimizer = distribute(model, config=config)
        train(model, optimizer, range(2))
        ref = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert ref() is None
        train(model, distribute(model, config=PowerSGD(rank=1)), range(2))


# Several optimizers


def check_workers_may_make_and_step_their_optimizers_in_any_order():
    for config in (CONFIG, PowerSGD(2, num_iters_per_step=1), TopK(0.1), NONE):
        usual = {seed: network(seed) for seed in (1, 2)}
        for model in usual.values():
            train(model, distribute(model, config=config), range(4))
        order = (1, 2) if hvd.rank() % 2 else (2, 1)
        models, optimizers = {}, {}
        for seed in order:
            models[seed] = network(seed)
            named = [(f"{seed}.{name}", p) for name, p in models[seed].named_parameters()]
            optimizers[seed] = hvd.DistributedOptimizer(
                torch.optim.SGD(models[seed].parameters(), lr=0.1, momentum=0.9), named, compression=config
            )
        for step in range(4):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            sum(loss_of(model, step) for model in models.values()).backward()
            for seed in order:
                optimizers[seed].step()
        for seed, model in sorted(models.items()):
            hvd.assert_replicas_equal(model)
            cases.assert_close(values(model), values(usual[seed]), 1e-6, config)


def check_one_worker_may_have_made_more_optimizers():
    for config in (CONFIG, NONE):
        for same_names in (True, False):
            if hvd.rank() == 0:
                exported = network()
                named = [(n if same_names else f"exported.{n}", p) for n, p in exported.named_parameters()]
                more = hvd.DistributedOptimizer(
                    torch.optim.SGD(exported.parameters(), lr=0.1), named, compression=config
                )
            model = network()
            optimizer = distribute(model, config=config)
            train(model, optimizer, range(3))
            if hvd.rank() == 0:
                more.load_state_dict(more.state_dict())


def check_optimizers_that_cannot_be_told_apart_are_an_error():
    models = [network(seed) for seed in range(3)]
    optimizers = [distribute(model) for model in models]
    other = network()
    named = [(f"other.{name}", p) for name, p in other.named_parameters()]
    last = hvd.DistributedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), named, compression=CONFIG)
    if hvd.rank() == 0:
        del models[0], optimizers[0]
    sum(loss_of(model, 0) for model in (*models, other)).backward()
    with pytest.raises(RuntimeError, match="cannot be told apart"):
        (last if hvd.rank() == 0 else optimizers[1]).step()


def check_without_compression_two_optimizers_may_share_parameters():
    encoder, heads = network(), [nn.Linear(16, 4), nn.Linear(16, 4)]
    for head in heads:
        hvd.broadcast_parameters(head.state_dict(), root_rank=0)
    for config in (NONE, CONFIG):
        optimizers = []
        for i, head in enumerate(heads):
            named = [(f"{i}.{name}", p) for part in (encoder, head) for name, p in part.named_parameters()]
            named = [(f"{name}.{place}", p) for place, (name, p) in enumerate(named)]
            sgd = torch.optim.SGD([p for _, p in named], lr=0.1)
            optimizers.append(hvd.DistributedOptimizer(sgd, named, compression=config))
        if config is CONFIG:
            with pytest.raises(RuntimeError, match="another DistributedOptimizer"):
                optimizers[0].step()
            continue
        for step in range(2):
            for head, optimizer in zip(heads, optimizers):
                for each in optimizers:
                    each.synchronize()
                    each.zero_grad()
                head(encoder(batch(step))).square().mean().backward()
                for each in optimizers:
                    each.synchronize()
                with optimizer.skip_synchronize():
                    optimizer.step()
        hvd.assert_replicas_equal(encoder)


def check_what_thaws_in_the_middle_of_a_step_is_told_of_and_elsewhere_without_gradients():
    model = network()
    optimizer = distribute(model)
    model[2].requires_grad_(False)
    train(model, optimizer, range(2))
    model[2].requires_grad_(True)
    with torch.no_grad():
        optimizer.zero_grad()
        optimizer.step()
    train(model, optimizer, range(2, 4))
    model[2].requires_grad_(False)
    optimizer.zero_grad()
    model[:2](batch(9)).square().mean().backward()
    model[2].requires_grad_(True)
    with pytest.raises(RuntimeError, match="2.bias has become trainable in the middle of a step"):
        model[2:](torch.ones(4, 32)).square().mean().backward()


# Errors


def check_an_error_inside_an_exchange_drops_the_step_and_the_next_one_is_whole():
    broken = False

    def function(delta, state):
        if broken and state.shape[0] == 24:
            raise ValueError("a mistake")
        mean = yield hvd.AllreduceMean(delta)
        return mean, delta

    usual = network()
    train(usual, distribute(usual, config=function), range(3))
    for cure in ("zero_grad", "synchronize", "nothing"):
        model = network()
        optimizer = distribute(model, config=function)
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        broken = True
        with pytest.raises(ValueError, match="a mistake"):
            loss_of(model, 9).backward()
        broken = False
        if cure == "synchronize":
            for call in (optimizer.synchronize, optimizer.step):
                with pytest.raises(RuntimeError, match="a mistake.*call zero_grad"):
                    call()
        if cure != "nothing":
            optimizer.zero_grad()
        loss_of(model, 2).backward()
        optimizer.step()
        hvd.assert_replicas_equal(model)
        cases.assert_close(values(model), values(usual), 1e-6, cure)


# Horovod's own compressions


def check_horovods_compressions_take_what_horovod_refuses():
    torch.manual_seed(0)
    images = torch.randn(4, 8, 6, 6) * (1 + hvd.rank())
    for compression in (NONE, hvd.Compression.fp16):
        for make in (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), lambda p: torch.optim.SGD(p, lr=0.1)):
            models = []
            for layout in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(1)
                model = nn.Conv2d(8, 16, 3).to(memory_format=layout)
                optimizer = distribute(model, make, compression)
                for _ in range(3):
                    optimizer.zero_grad()
                    model(images.to(memory_format=layout)).square().mean().backward()
                    optimizer.step()
                    assert model.weight.grad.stride() == model.weight.stride()
                models.append({name: p.detach().contiguous().numpy() for name, p in model.named_parameters()})
            cases.assert_close(*models, 1e-3 if compression is not NONE else 1e-5, compression)
        model = network().bfloat16()
        optimizer = distribute(model, config=compression)
        for step in range(2):
            optimizer.zero_grad()
            model(batch(step).bfloat16()).square().mean().backward()
            optimizer.step()
        hvd.assert_replicas_equal(model)
        assert model[0].weight.grad.dtype == torch.bfloat16
        embedding = nn.Embedding(50, 16, sparse=True)
        hvd.broadcast_parameters(embedding.state_dict(), root_rank=0)
        start = embedding.weight.detach().clone()
        optimizer = distribute(embedding, lambda p: torch.optim.SGD(p, lr=1.0), compression)
        for row in (3, 5):
            optimizer.zero_grad()
            if hvd.rank() == 0:
                embedding(torch.tensor([row])).sum().backward()
            optimizer.step()
        assert (start != embedding.weight).any(dim=1).nonzero().flatten().tolist() == [3, 5]
        hvd.assert_replicas_equal(embedding)


def check_batch_statistics_are_each_workers_own():
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    model(batch(0))
    hvd.assert_replicas_equal(model)
    with pytest.raises(AssertionError, match="1.running_mean"):
        hvd.assert_replicas_equal(model.state_dict())
