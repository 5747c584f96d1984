"""Runs checks inside real Horovod workers: one launch, many checks."""

import ast
import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from horovod_powersgd.launcher import launch_command, launch_environment

HERE = Path(__file__).parent

# (launcher, workers); None is a plain python process.
LAUNCHES = [(None, 1), *((f, w) for f in ("horovodrun --gloo", "mpirun") for w in (2, 3, 4))]


def checks_in(module):
    """The names of a module's functions that begin with check_, without importing it."""
    tree = ast.parse((HERE / f"{module}.py").read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


def checks_with(module, launcher, workers):
    """A module's checks in a job of so many workers: where four share a few cores, or three under Gloo, which waits
    busily, only those that compare, by their names, with the reference, or one worker's bits with another's."""
    checks = checks_in(module)
    if workers < (4 if launcher == "mpirun" else 3):
        return checks
    return [check for check in checks if re.search("equals|equal_the|same_bits", check)]


def launched(module, launches):
    """(*launch, check) of every check in every launch, which is (launcher, workers, ...)."""
    return [(*launch, check) for launch in launches for check in checks_with(module, *launch[:2])]


@functools.cache
def outcomes(module, launcher, workers, legacy_keras=False, seconds=480):
    """Runs a module's checks in the workers of one launch.

    Returns:
        ({check: [for each worker, None if it passed, otherwise its traceback]}, all workers' output)
    """
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(HERE / "worker.py"), module, folder, str(seconds)]
        program += checks_with(module, launcher, workers)
        command = launch_command(launcher, workers, program) if launcher else program
        assert command is not None, f"{launcher} is not installed"
        output = run(command, seconds + 15, {"TF_USE_LEGACY_KERAS": str(int(legacy_keras))})
        found = {}
        for report in sorted(Path(folder).glob("*.jsonl")):
            for line in report.read_text().splitlines():
                check, traceback = json.loads(line)
                found.setdefault(check, []).append(traceback)
    return found, output


def run(command, seconds, environment=None):
    """A job's output; it is ended with all its workers when it takes longer than it may."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "2",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
    }
    environment = {**launch_environment(), **settings, **(environment or {})}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        return job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            process.kill()
        return f"{job.communicate()[0]}\nended after {seconds} seconds: {' '.join(command)}"


def assert_passed(module, launcher, workers, check, legacy_keras=False):
    """Fails with every worker's traceback, or with the whole output where a worker said nothing."""
    found, output = outcomes(module, launcher, workers, legacy_keras)
    reports = found.get(check, [])
    tracebacks = [f"worker {i}:\n{traceback}" for i, traceback in enumerate(reports) if traceback]
    assert not tracebacks, "\n".join(tracebacks)
    assert len(reports) == workers, f"{workers - len(reports)} workers did not finish {check}:\n{output}"
