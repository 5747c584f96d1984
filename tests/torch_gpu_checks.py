"""What only a GPU shows, in the workers of a PyTorch job that share one: benchmarks/gpu.py runs them."""

import numpy as np
import torch

import cases
import horovod_powersgd.torch as hvd
from horovod_powersgd import Float16, PowerSGD, SignNorm, TopK
from trainee import Trainee


def random(*shape, **options):
    return torch.randn(*shape, device="cuda", **options)


def check_every_dtype_gives_what_a_processor_gives():
    shapes = {name: cases.SHAPES[name] for name in ("conv", "tall", "vector")}
    for config in (PowerSGD(rank=2), PowerSGD(rank=32, min_compression_rate=0), TopK(0.05), SignNorm(), Float16()):
        for dtype, largest in (("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-4), ("float64", 1e-9)):
            if dtype == "bfloat16" and isinstance(config, TopK):
                continue  # many numbers are equal there, and of these a GPU may take others
            pair = [Trainee(config, dtype, shapes, device) for device in ("cuda", "cpu")]
            for step in range(3):
                given = cases.gradients(step, hvd.rank(), "float32", shapes)
                updates = []
                for trainee in pair:
                    trainee.optimizer.zero_grad()
                    for name, p in trainee.parameters.items():
                        numbers = torch.from_numpy(given[name]).to(p)
                        (p * numbers).sum().backward()
                    trainee.optimizer.step()
                    updates.append([p.grad.double().cpu() for p in trainee.parameters.values()])
                for on_gpu, on_cpu in zip(*updates):
                    assert (on_gpu - on_cpu).norm() <= largest * on_cpu.norm(), (config, dtype, step)


def check_gradients_of_several_streams_are_waited_for():
    torch.manual_seed(0)
    own = [random(600, 500) / 30 for _ in range(6)]

    def train(streams):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in own]
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1), [(f"p{i}", p) for i, p in enumerate(parameters)],
            compression=PowerSGD(rank=2),
        )  # fmt: skip
        for step in range(5):
            given = torch.from_numpy(cases.gradients(step, hvd.rank(), "float32", {"x": (64, 600)})["x"]).cuda()
            losses = []
            for parameter, stream in zip(parameters, streams):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(3_000_000)  # what is not waited for is not there
                    losses.append(torch.tanh(given @ parameter).square().mean())
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().cpu() for p in parameters]

    plain = train([torch.cuda.current_stream()] * 6)
    for found, expected in zip(train([torch.cuda.Stream() for _ in range(6)]), plain):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def check_mixed_precision_trains_and_skips_what_overflows():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)).cuda()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=PowerSGD(rank=2))
    scaler, losses = torch.amp.GradScaler("cuda", init_scale=2.0**10), []
    rng = np.random.default_rng(hvd.rank())
    classes = np.random.default_rng(7).standard_normal((64, 8))
    for step in range(60):
        inputs = rng.standard_normal((128, 64)).astype("float32")
        targets = torch.from_numpy((inputs @ classes).argmax(1)).cuda()
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cuda", dtype=torch.float16):
            loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(inputs).cuda()).float(), targets)
        if step == 30 and hvd.rank() == 0:
            loss = loss * torch.inf
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step % 2:
            scaler.step(optimizer)
        else:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        assert same == (step == 30), step
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), losses
    hvd.assert_replicas_equal(dict(model.named_parameters()))


def check_a_model_may_be_moved_after_its_optimizer_has_been_made():
    shapes = {"linear": cases.SHAPES["linear"]}
    stays, moves = (Trainee(PowerSGD(rank=2), shapes=shapes, device=device) for device in ("cuda", "cpu"))
    moves.parameters["linear"].data = moves.parameters["linear"].data.cuda()
    for step in range(3):
        gradients = cases.gradients(step, hvd.rank(), "float32", shapes)
        cases.assert_close(moves.exchange(gradients), stays.exchange(gradients), 1e-5, step)


def check_a_checkpoint_goes_from_a_gpu_to_a_processor_and_back():
    shapes = {"linear": cases.SHAPES["linear"]}
    trainee = Trainee(PowerSGD(rank=2), shapes=shapes)
    for step in range(3):
        trainee.exchange(cases.gradients(step, hvd.rank(), "float32", shapes))
    state = trainee.optimizer.compression_state_dict()
    memory = state["tensors"]["linear"]["memory"]
    assert not memory.is_cuda and memory.norm() > 0
    again = Trainee(PowerSGD(rank=2), shapes=shapes)
    again.optimizer.load_compression_state_dict(state)
    gradients = cases.gradients(3, hvd.rank(), "float32", shapes)
    cases.assert_close(again.exchange(gradients), trainee.exchange(gradients), 1e-5, "loaded")
