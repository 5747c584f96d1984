"""Bases of factors: orthonormal whatever the factors are, and of the factors' own spaces."""

import numpy as np
import pytest
import torch

from horovod_powersgd.torch import orthogonalization
from horovod_powersgd.torch.orthogonalization import SMALL, _checked, _of_small, _unchecked, orthogonalize

N = 300


def factors(rank, least, dtype):
    """A factor (rank, N) with singular values that fall from 1 to `least`, and one of zeros; and their spare rows."""
    rng = np.random.default_rng(rank)
    left, right = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in (rank, N))
    factor = torch.from_numpy(left * np.geomspace(1, least, rank) @ right.T).to(dtype)
    spare = torch.from_numpy(rng.standard_normal((rank, N)))
    return [factor, torch.zeros_like(factor)], [lambda: spare] * 2


@pytest.mark.parametrize("rank", [1, 4, 32, 64])
@pytest.mark.parametrize("least", [0.1, 1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(
    "bases_of, dtype",
    [
        (orthogonalize, torch.float32),
        (_checked, torch.float32),
        (_checked, torch.float64),
        (_unchecked, torch.float32),
    ],
)
def test_a_basis_is_orthonormal_and_of_the_factors_space(bases_of, dtype, rank, least):
    given, spares = factors(rank, least, dtype)
    rounding = torch.finfo(dtype).eps
    for factor, basis in zip(given, bases_of(given, spares)):
        assert basis.shape == factor.shape and basis.dtype == dtype and basis.is_contiguous()
        basis, factor = basis.double(), factor.double()
        assert (basis @ basis.t() - torch.eye(rank)).abs().max() < 10 * rounding
        # What is left out of a row is no longer than what the reference takes for rounding.
        left = factor - factor @ basis.t() @ basis
        assert torch.linalg.vector_norm(left, dim=1).max() <= 128 * rounding * torch.linalg.vector_norm(factor)


@pytest.mark.parametrize("rank, n", [(1, 1), (1, 2), (3, 3), (4, 301), (7, 30), (8, 512)])
def test_a_small_factor_takes_one_pass(rank, n):
    if orthogonalization._kernels is None:
        pytest.skip("the kernels were not compiled")
    factor = torch.randn(n, rank, generator=torch.Generator().manual_seed(n)).t()
    basis = _of_small(factor)
    assert basis.is_contiguous() and _of_small(factor.double()) is None
    torch.testing.assert_close(basis, _checked([factor], [None])[0])
    large = torch.randn(4, 1 + SMALL // 16)
    assert _of_small(large) is None and _of_small(torch.ones(2, 9)) is None and _of_small(torch.zeros(1, 1)) is None


@pytest.mark.parametrize("bases_of", [orthogonalize, _checked, _unchecked])
def test_a_number_that_is_not_finite_spoils_its_own_basis_only(bases_of):
    given, spares = factors(4, 0.1, torch.float32)
    given[1][2, 7] = torch.inf
    good, bad = bases_of(given, spares)
    assert torch.isfinite(good).all() and not torch.isfinite(bad).any()
