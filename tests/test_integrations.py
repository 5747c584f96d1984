"""Workers of Ray and of Spark train with PowerSGD."""

import os
import shutil
import sys

import pytest

from job import HERE, run

NEEDED = {"ray": ["ray"], "spark": ["pyspark", "pyarrow", "pandas"]}
SETTINGS = {
    "ray": {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
    "spark": {"SPARK_LOCAL_IP": "127.0.0.1"},
}


@pytest.mark.parametrize("cluster", NEEDED)
def test_workers_are_one_job_and_send_what_powersgd_sends(cluster):
    for package in NEEDED[cluster]:
        pytest.importorskip(package, reason=f"{package} is not installed; .ci/integrations tests with it")
    if cluster == "spark" and "JAVA_HOME" not in os.environ and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    settings = {"PYTHONPATH": str(HERE), **SETTINGS[cluster]}
    output = run([sys.executable, str(HERE / "cluster_training.py"), cluster], 120, settings)
    assert "results: [(0, 2), (1, 2)]\n" in output, output
