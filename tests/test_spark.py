"""Workers of Spark train with PowerSGD."""

import os
import shutil
import sys

import pytest

from job import HERE, run

for package in ("pyspark", "pyarrow", "pandas"):
    pytest.importorskip(package, reason=f"{package} is not installed; .ci/integrations tests with it")
if "JAVA_HOME" not in os.environ and shutil.which("java") is None:
    pytest.skip("Spark needs Java", allow_module_level=True)


def test_workers_of_spark_are_one_job_and_send_what_powersgd_sends():
    settings = {"PYTHONPATH": str(HERE), "SPARK_LOCAL_IP": "127.0.0.1"}
    output = run([sys.executable, str(HERE / "cluster_training.py"), "spark"], 120, settings)
    assert "results: [(0, 2), (1, 2)]\n" in output, output
