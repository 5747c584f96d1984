"""Codes of 8 bits as PyTorch's tensors: compiled passes and PyTorch's operations do what numpy does."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from horovod_powersgd import quantization as plain
from horovod_powersgd.torch import quantization

ROWS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=5)


@pytest.fixture(params=["compiled", "PyTorch's"], scope="module")
def codes(request):
    """Whose passes are used."""
    assert quantization._codes is not None, "horovod_powersgd._quantization was not compiled: see .venv/setup.log"
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "compiled":
            patch.setattr(quantization, "_codes", None)
        yield


@given(ROWS, st.integers(1, 9), st.sampled_from(["float32", "float64"]), st.integers(0, 5))
def test_codes_are_numpys(codes, rows, count, dtype, seed):
    rng = np.random.default_rng(seed)
    lengths = [length for number, length in rows for _ in range(number)]
    numbers = np.concatenate([10.0 ** rng.integers(-44, 30) * rng.standard_normal(n) for n in lengths]).astype(dtype)
    if seed == 0:
        numbers[rng.integers(len(numbers))] = rng.choice([np.nan, np.inf, -np.inf])
    slices = plain.Slices(lengths, count)
    padded = np.zeros((count, slices.size), dtype)
    padded.reshape(-1)[: len(numbers)] = numbers
    units, expected = plain.encode(padded, slices.segments)

    found = quantization.Slices(tuple(rows), count, getattr(torch, dtype), torch.device("cpu"))
    numbers = torch.from_numpy(numbers)
    messages = found.encoded(numbers)
    assert messages.shape == (count, slices.nbytes(np.dtype(dtype).itemsize))
    decoded = plain.decode(units, expected, slices.segments)
    np.testing.assert_array_equal(found.decoded(messages[None]), decoded.reshape(-1)[: len(numbers)])
    # One slice of three workers.
    index = seed % count
    one = found.encoded(torch.from_numpy(padded[index]), index)
    assert torch.equal(one[0], messages[index])
    third = plain.decode(units / np.dtype(dtype).type(3), expected, slices.segments)
    everyones = messages.repeat(3, 1, 1)
    np.testing.assert_array_equal(found.decoded(everyones[:, [index]], 3, index), 3 * third[index])
    # In parts, a matrix each, of which all is in the memory: what is not sent stays.
    sizes, numbers = [number * length for number, length in rows], 2 * numbers
    parts = [quantization.Part(torch.zeros_like(part), part / 2, 2.0) for part in numbers.split(sizes)]
    messages, norms = found.encoded_parts(parts)
    assert torch.equal(messages, found.encoded(numbers))
    np.testing.assert_array_equal(torch.cat([part.delta for part in parts]), numbers - found.decoded(messages[None]))
    np.testing.assert_allclose(norms, [np.linalg.norm(part.double()) for part in numbers.split(sizes)], 1e-12)
    for write, part in zip(found.writers(messages[None], 3, sizes), parts):
        write(part.delta)
    mean = found.decoded(messages[None], 3)
    np.testing.assert_array_equal(torch.cat([part.delta for part in parts]), mean)
