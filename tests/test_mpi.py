"""The reference with real workers, over mpi4py."""

import pytest
from job import assert_passed, checks_in


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("check", checks_in("mpi_checks"))
def test_mpi(workers, check):
    assert_passed("mpi_checks", "mpirun", workers, check)
