"""TensorFlow under real Horovod: one worker without a launcher, and 2, 3 and 4 under Gloo and MPI."""

import pytest
from job import assert_passed, checks_in

LAUNCHES = [(None, 1), ("horovodrun --gloo", 2), ("mpirun", 3), ("horovodrun --gloo", 4)]


@pytest.mark.parametrize("launcher, workers", LAUNCHES)
@pytest.mark.parametrize("check", checks_in("tensorflow_checks"))
def test_tensorflow(launcher, workers, check):
    assert_passed("tensorflow_checks", launcher, workers, check)


@pytest.mark.parametrize("launcher, workers", [("mpirun", 2), ("horovodrun --gloo", 3)])
@pytest.mark.parametrize("check", checks_in("tensorflow_feature_checks"))
def test_tensorflow_features(launcher, workers, check):
    assert_passed("tensorflow_feature_checks", launcher, workers, check)
