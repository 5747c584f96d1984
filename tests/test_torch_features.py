"""What users do with PyTorch and Horovod, with PowerSGD on, under real Horovod."""

import pytest
from job import assert_passed, launched

LAUNCHES = [("horovodrun --gloo", 2), ("mpirun", 3)]


@pytest.mark.parametrize("launcher, workers, check", launched("torch_feature_checks", LAUNCHES))
def test_torch_features(launcher, workers, check):
    assert_passed("torch_feature_checks", launcher, workers, check)


@pytest.mark.parametrize("launcher, workers, check", launched("torch_practice_checks", LAUNCHES))
def test_torch_practice(launcher, workers, check):
    assert_passed("torch_practice_checks", launcher, workers, check)
