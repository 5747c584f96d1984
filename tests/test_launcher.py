"""One worker needs no launcher, and workers that would train alone are noticed."""

import os
import subprocess
import sys

import pytest

from horovod_powersgd import launcher
from horovod_powersgd.mpi import LoadedMpi, linked_mpi, recognised, title_of

PLACES = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_", "HOROVOD_", "OPAL_")
OPEN_MPI, MPICH = LoadedMpi("Open MPI", "PMIx", here=True), LoadedMpi("MPICH or Intel MPI", "PMI")

WORKER = """
import sys
import horovod.torch as hvd
from horovod_powersgd.launcher import check_world, prepare_worker
if "unprepared" not in sys.argv:
    prepare_worker()
hvd.init()
check_world(hvd.size())
sys.stdout.write(f"worker {hvd.rank()} of {hvd.size()}\\n")  # in one piece, which the other's cannot tear
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(PLACES):
            monkeypatch.delenv(name)


def run_under_mpirun(*arguments, **variables):
    command = launcher.launch_command("mpirun", 2, [sys.executable, "-c", WORKER, *arguments])
    assert command is not None, "the development environment has an mpirun"
    environment = {**launcher.launch_environment(), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.framework
def test_a_plain_python_script_runs_as_one_worker():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")}
    command = [sys.executable, "-c", WORKER]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert outcome.stdout == "worker 0 of 1\n", outcome.stderr


@pytest.mark.framework
@pytest.mark.parametrize("mpi", ["here", "elsewhere"])
def test_under_srun_an_mpi_of_this_environment_is_told_what_keeps_it_silent(mpi):
    program = "import os, sys, horovod.torch\nfrom horovod_powersgd.launcher import prepare_worker\n"
    program += "sys.prefix = '/elsewhere'\n" if mpi == "elsewhere" else ""
    program += "prepare_worker(); print(os.environ.get('OPAL_PREFIX'), os.environ['PMIX_SECURITY_MODE'])"
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PMIX_RANK": "0", "PMIX_SECURITY_MODE": "munge,native"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.stdout.split() == ([sys.prefix, "native"] if mpi == "here" else ["None", "munge,native"])


@pytest.mark.job
def test_workers_under_mpirun_are_one_job():
    outcome = run_under_mpirun()
    assert sorted(outcome.stdout.splitlines()) == ["worker 0 of 2", "worker 1 of 2"], outcome.stderr


@pytest.mark.job
def test_mpirun_with_horovod_kept_from_mpi_is_refused_before_it_can_crash():
    outcome = run_under_mpirun(HOROVOD_CONTROLLER="gloo")
    assert outcome.returncode != 0
    assert "RuntimeError: mpirun started 2 workers, but HOROVOD_CONTROLLER=gloo" in outcome.stderr
    assert "horovodrun --gloo -np 2" in outcome.stderr


@pytest.mark.job
def test_workers_that_came_up_as_separate_jobs_say_so():
    outcome = run_under_mpirun("unprepared", HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
    assert outcome.returncode != 0
    assert "RuntimeError: mpirun started 2 workers" in outcome.stderr
    assert "worker 0 of 1" not in outcome.stdout


def test_a_worker_of_a_launcher_is_not_isolated(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("PMIX_RANK", "0")
    launcher.prepare_worker()
    assert "OMPI_MCA_ess_singleton_isolated" not in os.environ


def test_the_users_own_choice_for_a_single_worker_stands(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_ess_singleton_isolated", "0")
    launcher.prepare_worker()
    assert os.environ["OMPI_MCA_ess_singleton_isolated"] == "0"


# What each launcher tells its workers, as it was seen.
BY_OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}
BY_HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}
BY_SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
BY_SRUN_PMIX = {**BY_SRUN, "PMIX_RANK": "0"}
BY_SRUN_PMI2 = {**BY_SRUN, "PMI_SIZE": "2", "PMI_RANK": "0"}
HYDRA_ON_SLURM = {**BY_SRUN, **BY_HYDRA}  # srun starts its daemons, and they the workers


@pytest.mark.parametrize(
    "mpi, variables, words",
    [
        (MPICH, BY_OPEN_MPI, "mpirun started 2 workers, but it is Open MPI's, and .* built for MPICH or Intel MPI: "),
        (OPEN_MPI, BY_HYDRA, "mpirun started 2 workers, but it is MPICH or Intel MPI's, and .* built for Open MPI: "),
        (OPEN_MPI, HYDRA_ON_SLURM, "mpirun started 2 workers, but it is MPICH or Intel MPI's, "),
        (OPEN_MPI, BY_SRUN, "srun started 2 workers without PMI, but Open MPI.*only PMIx.* do: srun --mpi=pmix "),
        (OPEN_MPI, BY_SRUN_PMI2, "srun started 2 workers with PMI, but Open MPI.* do: srun --mpi=pmix "),
        (OPEN_MPI, {"SLURM_STEP_NUM_TASKS": "1"}, "srun started 1 worker without PMI, but Open MPI"),
        (MPICH, BY_SRUN_PMIX, "srun started 2 workers with PMIx, but MPICH or Intel MPI.* do: srun --mpi=pmi2 "),
    ],
)
def test_a_launcher_that_horovods_mpi_does_not_know_is_refused_before_it_aborts(monkeypatch, mpi, variables, words):
    monkeypatch.setattr(launcher, "loaded_mpi", lambda: mpi)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=words):
        launcher.prepare_worker()


@pytest.mark.parametrize(
    "mpi, variables",
    [
        (OPEN_MPI, BY_OPEN_MPI),
        (OPEN_MPI, {**BY_SRUN, **BY_OPEN_MPI}),
        (OPEN_MPI, BY_SRUN_PMIX),
        (OPEN_MPI, {**BY_SRUN, "HOROVOD_SIZE": "2"}),
        (LoadedMpi("Open MPI", None), BY_SRUN_PMI2),
        (MPICH, BY_HYDRA),
        (MPICH, HYDRA_ON_SLURM),
        (MPICH, BY_SRUN_PMI2),
        (MPICH, {"SLURM_STEP_NUM_TASKS": "1"}),
        (None, BY_SRUN),
    ],
)
def test_a_launcher_that_may_know_horovods_mpi_is_not_refused(monkeypatch, mpi, variables):
    monkeypatch.setattr(launcher, "loaded_mpi", lambda: mpi)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launcher.prepare_worker()


def test_an_mpi_is_recognised_by_its_files():
    def maps(*files):
        return "".join(f"7f5c0000-7f5d0000 r-xp 00000000 08:01 42                 {file}\n" for file in files)

    assert recognised(maps("/env/lib/libmpi.so.40.30.8", "/env/lib/libopen-pal.so.40.30.3"), "/env") == OPEN_MPI
    assert recognised(maps("/usr/lib/libopen-pal.so.40.30.2"), "/env") == LoadedMpi("Open MPI", None)
    assert recognised(maps("/env/lib/libmpi.so.12"), "/env") == MPICH
    assert recognised(maps("/usr/lib/x86_64-linux-gnu/libmpich.so.12.2.1"), "/env") == MPICH
    built_with_pmix = maps("/usr/lib/libmpich.so.12.2.1", "/usr/lib/libpmix.so.2.6.2")
    assert recognised(built_with_pmix, "/env") == LoadedMpi("MPICH or Intel MPI", None)
    assert recognised(maps("/usr/lib/libc.so.6"), "/env") is None


@pytest.mark.parametrize(
    "name, version, title",
    [
        ("libmpi.so.40", "Open MPI 5.0.11", "Open MPI"),
        ("libmpi.so.12", "MPICH 5.0.2", "MPICH or Intel MPI"),
        ("libmpich.so.12", "Intel MPI 2021.18.1", "MPICH or Intel MPI"),
        ("libm.so.6", "unknown", None),
    ],
)
def test_an_mpi_is_the_one_of_the_file_that_a_library_was_linked_to(tmp_path, name, version, title):
    (tmp_path / "library.so").write_bytes(b"\x7fELF\0libc.so.6\0" + name.encode() + b"\0libtorch.so\0")
    assert linked_mpi(tmp_path / "library.so") == title_of(version) == title


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_job_of_several_that_has_size_one_is_an_error(monkeypatch, name):
    monkeypatch.setenv(name, "4")
    with pytest.raises(RuntimeError, match=r"(mpirun|srun) started 4 workers, but each .* job of size 1"):
        launcher.check_world(1)
    launcher.check_world(4)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, which srun did not start
        {"HOROVOD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"},  # horovodrun inside a Slurm step
        {"HOROVOD_ELASTIC": "1", "HOROVOD_SIZE": "2"},  # an elastic job that shrank
    ],
)
def test_a_job_that_is_meant_to_have_one_worker_is_left_alone(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launcher.prepare_worker()
    launcher.check_world(1)


def test_horovodrun_may_choose_gloo(monkeypatch):
    for name, value in {"HOROVOD_SIZE": "2", "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}.items():
        monkeypatch.setenv(name, value)
    launcher.prepare_worker()
    launcher.check_world(2)


def test_a_launcher_that_is_not_installed_has_no_command(monkeypatch):
    monkeypatch.setattr(launcher, "find_program", lambda name: None)
    assert launcher.launch_command("mpirun", 2, ["true"]) is None
