"""A Horovod for MPICH under MPICH's mpirun."""

import os
import sys
from pathlib import Path

import pytest

from horovod_powersgd.launcher import launch_command
from job import HERE, run

pytestmark = pytest.mark.skipif(
    not Path(sys.prefix, "bin/mpichversion").exists(),
    reason="this environment has no MPICH; .ci/integrations tests with one",
)
TRAINING = [sys.executable, str(HERE / "cluster_training.py"), "mpirun"]
SETTINGS = {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE)))}


def test_workers_of_mpichs_mpirun_are_one_job_and_send_what_powersgd_sends():
    output = run(launch_command("mpirun", 2, TRAINING), 120, SETTINGS)
    assert "results: (0, 2)\n" in output and "results: (1, 2)\n" in output, output


def test_doctor_names_it():
    output = run([sys.executable, "-m", "horovod_powersgd", "doctor"], 120, SETTINGS)
    assert "MPICH" in output and "A job of two workers works." in output, output


def test_open_mpis_mpirun_is_refused():
    mpirun = HERE.parent / ".venv/bin/mpirun"
    output = run([str(mpirun), "-np", "2", *TRAINING], 120, SETTINGS)
    assert "mpirun started 2 workers, but it is Open MPI's, and Horovod was built for MPICH" in output, output
    assert "results:" not in output, output
