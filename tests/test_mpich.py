"""MPICH or Intel MPI, for which this environment's Horovod is built; and Open MPI with its own Horovod, of .venv."""

import sys

import pytest

from horovod_powersgd.environment import doctor
from horovod_powersgd.environment.installed_mpi import find_mpi
from horovod_powersgd.launcher import launch_command
from job import HERE, run

HERE_IS = find_mpi().version or "none"
if not HERE_IS.startswith(("MPICH ", "Intel MPI ")):
    pytest.skip(f"the MPI here is {HERE_IS}; .ci/integrations tests with MPICH and Intel's", allow_module_level=True)
OPEN_MPIS = HERE.parent / ".venv" / "bin"


def train(python, mpirun=None):
    """What a training by two workers says.

    Args:
        python: of the workers.
        mpirun: this environment's by default.
    """
    command = launch_command("mpirun", 2, [str(python), str(HERE / "cluster_training.py"), "mpirun"])
    return run([str(mpirun or command[0]), *command[1:]], 120)


def test_workers_are_one_job_and_send_what_powersgd_sends():
    output = train(sys.executable)
    assert "results: (0, 2)\n" in output and "results: (1, 2)\n" in output, output


def test_doctor_names_the_mpi_and_finds_that_horovod_was_built_for_it():
    report = doctor.find_facts()
    assert report["mpi"]["version"] == HERE_IS and report["horovod"]["mpi"]
    assert "Horovod was built for" not in str(doctor.find_problems(report))


@pytest.mark.parametrize(
    "python, mpirun, words",
    [
        (sys.executable, OPEN_MPIS / "mpirun", "is Open MPI's, and Horovod was built for MPICH or Intel MPI"),
        (OPEN_MPIS / "python", None, "is MPICH or Intel MPI's, and Horovod was built for Open MPI"),
    ],
    ids=["Open MPI's", "this one"],
)
def test_the_mpirun_of_another_mpi_is_refused(python, mpirun, words):
    output = train(python, mpirun)
    assert f"RuntimeError: mpirun started 2 workers, but it {words}: they would" in output, output
