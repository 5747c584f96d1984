"""The reference with real workers, over mpi4py."""

import pytest
from job import assert_passed, launched

LAUNCHES = [("mpirun", workers) for workers in (2, 3, 4)]


@pytest.mark.parametrize("launcher, workers, check", launched("mpi_checks", LAUNCHES))
def test_mpi(launcher, workers, check):
    assert_passed("mpi_checks", launcher, workers, check)
