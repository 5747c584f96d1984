"""Workers of Ray train with PowerSGD."""

import sys

import pytest

from job import HERE, run

pytest.importorskip("ray", reason="Ray is not installed; .ci/integrations tests with it")


def test_workers_of_ray_are_one_job_and_send_what_powersgd_sends():
    settings = {"PYTHONPATH": str(HERE), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    output = run([sys.executable, str(HERE / "cluster_training.py"), "ray"], 120, settings)
    assert "results: [(0, 2), (1, 2)]\n" in output, output
