"""Jobs on a Slurm of two nodes, by each command that docs/launch.md names; and mpirun's over ssh, without Slurm."""

import json
import shlex
import sys

import pytest

import slurm_cluster
import ssh_hosts
from horovod_powersgd.launcher import launch_environment
from job import HERE, run

CHECK = "launched_checks.check_a_few_steps_equal_the_reference"
HOSTS = "$(scontrol show hostnames | sed s/$/:1/ | paste -sd,)"


@pytest.fixture(scope="module")
def hosts():
    """Where commands find hosts by ssh: the variables."""
    if ssh_hosts.missing():
        pytest.skip(ssh_hosts.missing())
    with ssh_hosts.ssh_hosts() as folder:
        yield {"PATH": f"{folder}:{launch_environment()['PATH']}"}


@pytest.fixture(scope="module")
def slurm():
    """Where commands find Slurm: the variables."""
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    with slurm_cluster.cluster() as variables:
        yield variables


def assert_trains(command, folder, variables):
    """Two workers, whose reports come into a folder, pass the check, and MPI has nothing to say."""
    output = run(shlex.split(command), 120, variables)
    output += "".join(file.read_text() for file in folder.glob("output"))  # of sbatch
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [line["report"]["failure"] for line in lines if line["check"] == CHECK] == [None, None], output
    assert "help file" not in output and "PMIX ERROR" not in output, output


def arguments(folder):
    """Of python, for one worker."""
    return [str(HERE / "worker.py"), str(folder), "100", CHECK]


def program(folder):
    return shlex.join([sys.executable, *arguments(folder)])


# The batch script's srun has a node for each worker.
@pytest.mark.parametrize("command", ["srun --mpi=pmix -N 1 -n 2 {}", "salloc -N 2 mpirun --bind-to none {}"])
def test_a_job_of_slurm(command, slurm, tmp_path):
    assert_trains(command.format(program(tmp_path)), tmp_path, slurm)


def test_horovodrun_in_an_allocation(slurm, hosts, tmp_path):
    job = f"horovodrun --gloo -np 2 -H {HOSTS} {program(tmp_path)}"
    assert_trains(f"salloc -N 2 bash -c {shlex.quote(job)}", tmp_path, {**slurm, **hosts})


def test_the_batch_script_of_the_examples(slurm, tmp_path):
    script = HERE.parent / "examples" / "slurm.sbatch"
    options = f"--wait --ntasks-per-node=1 --output={tmp_path}/output"
    assert_trains(f"sbatch {options} {script} {shlex.join(arguments(tmp_path))}", tmp_path, slurm)


def test_srun_without_pmix_is_refused_with_what_to_type(slurm, tmp_path):
    output = run(shlex.split(f"srun --mpi=none -N 2 {program(tmp_path)}"), 120, slurm)
    assert output.count("RuntimeError: srun started 2 workers without PMI, but Open MPI, for which") == 2, output
    assert "srun --mpi=pmix python ..." in output and "MPI_Init" not in output


def test_mpirun_with_a_host_file_over_ssh(hosts, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    job = f"unset HOROVOD_DYNAMIC_PROCESS_SETS; $(which mpirun) --hostfile {tmp_path}/hosts --bind-to none -x PATH"
    assert_trains(f"bash -c {shlex.quote(f'{job} {program(tmp_path)}')}", tmp_path, hosts)
