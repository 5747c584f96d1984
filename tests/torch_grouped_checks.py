"""GPU's kernels, which Triton's interpreter runs on the processor, and what exchanges by them."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Where .ci/setup has put Triton; PyTorch for GPUs has brought its own.
    sys.path.append(str(Path(sys.prefix) / "triton"))

import cases
import horovod_powersgd.torch as hvd
from equivalence import Equivalence
from horovod_powersgd import PowerSGD, arrays, rounding
from horovod_powersgd.layout import leading_rows
from horovod_powersgd.torch import grouped_kernels
from horovod_powersgd.torch.grouped_bucket import GroupedBucket
from horovod_powersgd.torch.grouped_kernels import half_steps, keep_all, orthogonalize, products
from horovod_powersgd.torch.half_memory import Drawn, HalfMemory, Keep
from horovod_powersgd.torch.kernels import HalfStep, Memory, Product
from trainee import DEVICE, Trainee

RANKS = 1, 3, 16, 32
# More than one program's share of rows, and of columns; and what fills no tile.
SHAPES = (50, 70), (3, 16500), (300, 20), (30, 260)
CONFIGS = [
    PowerSGD(rank=3, min_compression_rate=0, num_iters_per_step=3),
    PowerSGD(num_iters_per_step=1, wire_dtype="float16"),
    PowerSGD(warm_start=False, warmup_steps=1),
    PowerSGD(error_feedback=False, refresh_every=2),
    PowerSGD(rank=2, memory_dtype="bfloat16"),
    PowerSGD(rank=2, memory_dtype="float16"),
]
equivalence = Equivalence(hvd, Trainee, leading_rows)


def random(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


def check_grouped_passes_equal_plain_products():
    torch.manual_seed(0)
    for rank in RANKS:
        tasks, expected = [], []
        for i, (n, m) in enumerate(SHAPES):
            for makes_q in (False, True):
                delta, basis, memory = random(n, m), random(rank, n if makes_q else m), None
                exact = delta.double()
                if (i + makes_q) % 4:
                    left, p, q = random(n, m), random(2, n), random(2, m)
                    halves = left.bfloat16()
                    memory = [Memory(left), Memory(left, p, q), HalfMemory(halves, left.dtype)][(i + makes_q) % 4 - 1]
                    exact += 0.5 * (halves if memory.storage() is halves else left).double()
                    exact -= 0.5 * p.double().t() @ q.double() * (memory.parts()[1] is not None)
                tasks.append(HalfStep(delta, basis, makes_q, memory, 0.5))
                expected.append((exact, basis.double() @ (exact if makes_q else exact.t())))
        found = half_steps(tasks, torch.float32).split([factor.numel() for _, factor in expected])
        for task, part, (delta, factor) in zip(tasks, found, expected):
            assert (task.delta - delta).norm() < 1e-6 * delta.norm(), (rank, delta.shape)
            assert (part.view_as(factor) - factor).norm() < 1e-6 * factor.norm(), (rank, delta.shape, task.makes_q)
        updates = [Product(random(rank, n), random(rank, m), random(n, m) * torch.nan) for n, m in SHAPES]
        products(updates)
        for p, q, out in updates:
            exact = p.double().t() @ q.double()
            assert (out - exact).norm() < 1e-6 * exact.norm(), (rank, out.shape)


def check_grouped_memories_in_16_bits_are_rounded_as_the_references():
    torch.manual_seed(0)
    tasks, lefts = [], []
    for i, (n, m) in enumerate(SHAPES):
        delta, p, q = random(n, m), random(3, n), random(3, m)
        memory = Memory(delta, p, q) if i % 2 else Memory(delta)
        drawn = Drawn.of(i, (n, m), delta.device).in_step(5, hvd.rank())
        tasks.append(Keep(memory, drawn, torch.empty(n, m, dtype=torch.bfloat16, device=DEVICE)))
        lefts.append(delta.double() - p.double().t() @ q.double() if i % 2 else delta)
    keep_all(tasks)
    for i, ((_, drawn, halves), left) in enumerate(zip(tasks, lefts)):
        found = halves.float().cpu().numpy()
        rows, columns = (drawn.rows + drawn.of_step).cpu().numpy(), drawn.columns.cpu().numpy()
        expected = rounding.rounded(arrays, left.cpu().numpy(), "bfloat16", rows, columns)
        # Where P and Q are subtracted first, in another order, some of what is next to a draw goes the other way.
        differ = found != expected
        assert differ.mean() <= (1e-3 if i % 2 else 0), (i, differ.mean())
        assert (abs(found - expected) <= 2**-7 * abs(expected) + 1e-6).all()


def check_grouped_orthogonalization_makes_bases_of_the_same_spaces():
    torch.manual_seed(0)
    for rank in RANKS:
        factors = [random(rank, n) for n in (40, 300, 1100)]
        spares = [random(*factor.shape, dtype=torch.float64) for factor in (*factors, factors[0])]
        factors.append(torch.zeros_like(factors[0]))
        if rank > 1:
            factors[0][1] = factors[0][0]  # a direction of its own comes from the spare rows
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouped_kernels, "PROGRAMS_OF_A_FACTOR", 4)  # so that each takes several blocks of columns
            bases = orthogonalize(factors, spares)
        for factor, basis in zip(factors, bases):
            basis = basis.double()
            assert (basis @ basis.t() - torch.eye(rank, device=DEVICE)).abs().max() < 1e-6
            outside = factor.double() - factor.double() @ basis.t() @ basis
            assert outside.norm() <= 1e-5 * factor.norm()
        factors[1][0, 7] = torch.inf
        assert not torch.isfinite(orthogonalize(factors, spares)[1]).any()


def check_grouped_exchanges_equal_the_reference():
    # One worker stands for all: what is sent between them is the other buckets', too.
    equivalence.a_run_of_compressors(list(itertools.product(CONFIGS, ["float32"])), steps=3)
    trainee = Trainee(PowerSGD())
    trainee.exchange(cases.gradients(0, hvd.rank(), "float32"))
    assert any(isinstance(bucket, GroupedBucket) for bucket in trainee.optimizer._engine._buckets)


def check_without_a_compiler_pytorchs_operations_take_their_place():
    def fails(*_):
        raise OSError("Failed to find C compiler")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_kernels, "products", fails)
        grouped_kernels._work.cache_clear()
        trainee = Trainee(PowerSGD(rank=2), shapes={"linear": cases.SHAPES["linear"]})
        with pytest.warns(UserWarning, match="Failed to find C compiler.*some times longer"):
            trainee.exchange(cases.gradients(0, hvd.rank(), "float32", {"linear": cases.SHAPES["linear"]}))
    grouped_kernels._work.cache_clear()
    assert not any(isinstance(bucket, GroupedBucket) for bucket in trainee.optimizer._engine._buckets)


def check_a_step_that_is_not_finite_leaves_the_grouped_memory():
    trainee, undisturbed = (Trainee(PowerSGD(rank=2), shapes={"linear": cases.SHAPES["linear"]}) for _ in range(2))
    for step in range(3):
        gradients = cases.gradients(step, hvd.rank(), "float32", {"linear": cases.SHAPES["linear"]})
        if step == 1:
            spoiled = {"linear": gradients["linear"].copy()}
            spoiled["linear"][3, 5] = float("inf")
            assert not all(map(lambda update: (update == update).all(), trainee.exchange(spoiled).values()))
            for parameter in trainee.parameters.values():
                parameter.data.zero_()
        cases.assert_close(trainee.exchange(gradients), undisturbed.exchange(gradients), 1e-5, step)
