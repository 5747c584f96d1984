"""What users do with PyTorch and Horovod, with PowerSGD on, under real Horovod."""

import pytest
from job import assert_passed, checks_in


@pytest.mark.parametrize("launcher, workers", [("mpirun", 2), ("horovodrun --gloo", 3)])
@pytest.mark.parametrize("check", checks_in("torch_feature_checks"))
def test_torch_features(launcher, workers, check):
    assert_passed("torch_feature_checks", launcher, workers, check)
