"""The reference with real workers, over mpi4py."""

import pytest

from job import Launch, assert_passed, launched

LAUNCHES = [Launch("mpirun", workers, ("mpi_checks",)) for workers in (2, 3, 4)]


@pytest.mark.parametrize("launch, check", launched("mpi_checks", LAUNCHES))
def test_mpi(launch, check):
    assert_passed(launch, check)
