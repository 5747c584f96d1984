"""The compiled passes over a gradient, and PyTorch's own where there are none, against plain products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from horovod_powersgd import arrays, rounding
from horovod_powersgd.torch import kernels
from horovod_powersgd.torch.finite import all_finite
from horovod_powersgd.torch.half_memory import Drawn, Keep, keep
from horovod_powersgd.torch.kernels import HalfStep, Memory, Product, half_steps, products

SIDES = st.integers(1, 70) | st.sampled_from([1023, 1024, 1025, 2100])
DTYPES = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(params=["compiled", "compiled, in threads", "PyTorch's"])
def implementation(request, monkeypatch):
    assert kernels._kernels is not None, "horovod_powersgd._kernels was not compiled: see .venv/setup.log"
    if request.param == "PyTorch's":
        monkeypatch.setattr(kernels, "_kernels", None)
    if request.param == "compiled, in threads":
        monkeypatch.setattr(kernels, "BYTES_PER_THREAD", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def assert_close(found, expected):
    # Sums of up to 2100 products.
    tolerance = 1e3 * np.finfo(found.numpy().dtype).eps
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=tolerance, atol=tolerance * 10)


# The fixture changes nothing between two examples.
each_implementation = settings(deadline=None, max_examples=40, suppress_health_check=["function_scoped_fixture"])


@each_implementation
@given(n=SIDES, m=SIDES, rank=st.integers(1, 9), sent=st.integers(1, 9), makes_q=st.booleans(), dtype=DTYPES)
def test_a_half_step_adds_the_memory_and_multiplies(implementation, n, m, rank, sent, makes_q, dtype):
    draw = torch.Generator().manual_seed(n * m)
    gradient, delta, p, q, basis = (
        torch.randn(shape, generator=draw, dtype=dtype)
        for shape in ((n, m), (n, m), (sent, n), (sent, m), (rank, n if makes_q else m))
    )
    left = delta - p.t() @ q
    for memory, expected in (
        (None, gradient),
        (Memory(delta.clone(), p, q), gradient + 0.5 * left),
        (Memory(left.clone()), gradient + 0.5 * left),
    ):
        found = gradient.clone()
        other = gradient.clone()  # two matrices, of which one has no memory
        tasks = [HalfStep(other, basis, makes_q), HalfStep(found, basis, makes_q, memory, scale=0.5)]
        factors = half_steps(tasks).split([task.size for task in tasks])
        for delta, exact, factor in ((other, gradient, factors[0]), (found, expected, factors[1])):
            assert_close(delta, exact)
            assert_close(factor.view(rank, -1), basis @ (exact if makes_q else exact.t()))


@each_implementation
@given(n=SIDES, m=SIDES, rank=st.integers(1, 9), dtype=DTYPES)
def test_a_product_is_written_over_what_was_there(implementation, n, m, rank, dtype):
    draw = torch.Generator().manual_seed(n * m)
    p, q = (torch.randn(rank, side, generator=draw, dtype=dtype) for side in (n, m))
    out, other = torch.full((n, m), torch.nan, dtype=dtype), torch.full((m, n), torch.nan, dtype=dtype)
    products([Product(p, q, out), Product(q, p, other)])
    assert_close(out, p.t() @ q)
    assert_close(other, q.t() @ p)


@each_implementation
@given(n=SIDES, m=SIDES, rank=st.integers(1, 9), dtype=DTYPES)
def test_looking_at_the_memory_changes_no_bit_of_the_next_step(implementation, n, m, rank, dtype):
    draw = torch.Generator().manual_seed(n * m)
    gradient, delta, p, q, basis = (
        torch.randn(shape, generator=draw, dtype=dtype) for shape in ((n, m), (n, m), (rank, n), (rank, m), (1, m))
    )
    seen, unseen = Memory(delta.clone(), p, q), Memory(delta.clone(), p, q)
    assert_close(seen.tensor(), delta - p.t() @ q)
    results = []
    for memory in (seen, unseen):
        found = gradient.clone()
        results += [(half_steps([HalfStep(found, basis, False, memory)]), found)]
    for first, second in zip(*results):
        assert torch.equal(first, second)


@settings(each_implementation, max_examples=10)
@given(n=SIDES, m=SIDES, rank=st.integers(1, 9), name=st.sampled_from(list(rounding.BITS_CUT_OFF)))
def test_a_memory_in_16_bits_is_rounded_as_the_references_and_added_as_it_is(implementation, n, m, rank, name):
    draw = torch.Generator().manual_seed(n * m)
    gradient, delta, p, q, basis = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((n, m), (n, m), (rank, n), (rank, m), (1, m))
    )
    drawn, halves = Drawn.of(7, (n, m), delta.device).in_step(3, 1), torch.empty(n, m, dtype=getattr(torch, name))
    left = (delta - p.t() @ q).numpy()
    expected = rounding.rounded(arrays, left, name, drawn.rows.numpy() + drawn.of_step, drawn.columns.numpy())
    memory = keep(Keep(Memory(delta, p, q), drawn, halves))
    kept = memory.tensor()
    # Half precision has a smallest number: far below the largest, it rounds once more.
    smallest = abs(left).max() * 2.0**-38 if name == "float16" else 0
    np.testing.assert_allclose(kept.numpy(), expected, rtol=0, atol=smallest)
    found = gradient.clone()
    half_steps([HalfStep(found, basis, False, memory, scale=0.5)])
    assert_close(found, gradient + 0.5 * kept)


def test_what_is_not_finite_stays_so(implementation):
    for value in (np.nan, np.inf):
        delta = torch.ones(9, 50)
        delta[3, 7] = value
        p = half_steps([HalfStep(delta.clone(), torch.ones(2, 50), False)]).view(2, 9)
        q = half_steps([HalfStep(delta.clone(), torch.ones(2, 9), True)]).view(2, 50)
        assert not torch.isfinite(p[:, 3]).any() and not torch.isfinite(q[:, 7]).any()
        out = torch.zeros(9, 50)
        products([Product(delta[:, 7][None].contiguous(), torch.ones(1, 50), out)])
        assert not torch.isfinite(out[3]).any() and torch.isfinite(out[4]).all()


def test_matrices_of_two_dtypes_make_factors_of_the_finer_one(implementation):
    single, double = torch.randn(5, 7), torch.randn(6, 4, dtype=torch.float64)
    tasks = [HalfStep(single, torch.ones(2, 7), False), HalfStep(double, torch.ones(3, 6, dtype=torch.float64), True)]
    first, second = half_steps(tasks).split([10, 12])
    assert_close(first.view(2, 5).float(), single.sum(1).expand(2, 5))
    assert_close(second.view(3, 4), double.sum(0).expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_are_told_from_others(dtype):
    largest = torch.finfo(dtype).max
    for length in (1, 2, 7, 64, 1001):
        numbers = torch.tensor([largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny, 1.0], dtype=dtype).repeat(length)
        assert all_finite(numbers) and all_finite(numbers[::2])
        for value in (torch.inf, -torch.inf, torch.nan, -torch.nan):
            for place in (0, len(numbers) // 2, len(numbers) - 1):
                spoiled = numbers.clone()
                spoiled[place] = value
                assert not all_finite(spoiled), (value, place, length)
