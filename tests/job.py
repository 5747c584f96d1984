"""Runs checks inside real Horovod workers: one launch, many checks."""

import ast
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from horovod_powersgd.launcher import launch_command, launch_environment

HERE = Path(__file__).parent
# What jobs see of this process's: later, one may begin while a test has variables of its own.
ENVIRONMENT = launch_environment()
# Far more than a check takes; and than all of a launch take. They have what the other tests leave of two cores: of a
# check that alone takes 10 seconds, that has made more than 200.
CHECK_SECONDS, LAUNCH_SECONDS = 600, 2400
COMPARING = "equals|equal_the|same_bits"
# horovodrun, but for its first step: to see that Horovod was built with Gloo it imports TensorFlow, each time.
HOROVODRUN = """
import horovod.common.util
horovod.common.util.gloo_built = lambda verbose: True
from horovod.runner.launch import run_commandline
run_commandline()
"""


class Check(NamedTuple):
    """A function of a module, by their names."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class Launch(NamedTuple):
    """Workers that start together and run the checks of some modules, one after the other.

    Attributes:
        launcher: None for a plain python process.
        workers: how many.
        modules: whose checks they run, in this order.
        partly: modules of which they run then only the checks whose names match the pattern: where many workers share
            a few cores, or another launch runs the others.
        pattern: of those checks' names; unless given, they compare with the reference, or workers' bits.
        variables: of the workers' environment, as (name, value).
        compression: with which `python -m horovod_powersgd run` starts the workers; None to start them without it.
    """

    launcher: str | None
    workers: int
    modules: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    pattern: str = COMPARING
    variables: tuple[tuple[str, str], ...] = ()
    compression: str | None = None

    def __str__(self):
        settings = [f"{name}={value}" for name, value in self.variables]
        return " ".join([self.launcher or "plain", str(self.workers), *settings])


class ElasticJob(NamedTuple):
    """Workers under horovodrun, on several hosts, of which one dies; later another one comes.

    Attributes:
        program: in this folder. It gets a folder, to which its workers report, and the kind.
        kind: of training.
        variables: of the workers' environment, as (name, value).
        hosts: how many there are.
        per_host: how many workers each has.
    """

    program: str
    kind: str
    variables: tuple[tuple[str, str], ...] = ()
    hosts: int = 3
    per_host: int = 1


class Report(NamedTuple):
    """What one worker tells of a check, or of its start.

    Attributes:
        failure: the traceback, or None.
        seconds: that it took.
        cpu_seconds: of all its threads.
    """

    failure: str | None
    seconds: float
    cpu_seconds: float


@dataclass
class Outcome:
    """What became of a launch.

    Attributes:
        starts: each worker's Report of its start.
        reports: for each check that was run, {worker: Report}.
        output: all that the workers wrote.
        seconds: from the launcher's start to its end.
        explained: the check whose failure shows the output, once one has; so the others need not.
    """

    starts: list[Report]
    reports: dict[Check, dict[int, Report]]
    output: str
    seconds: float
    explained: Check | None = None


# The checks that pytest has selected, by launch: conftest.py fills it.
selected: dict[Launch, set[Check]] = {}
# Of launches that have begun.
_outcomes: dict[Launch, Future] = {}
_running: set[subprocess.Popen] = set()
# Of several workers two launches at a time: while workers wait for each other, they need less than two cores.
_one_worker, _several_workers, _elastic = (ThreadPoolExecutor(count) for count in (1, 2, 1))


@functools.cache
def checks_in(module):
    """The names of a module's functions that begin with check_, without importing it."""
    tree = ast.parse((HERE / f"{module}.py").read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


def checks_of(launch):
    """All that a launch runs."""
    whole, partly = (
        [Check(module, name) for module in modules for name in checks_in(module)]
        for modules in (launch.modules, launch.partly)
    )
    return whole + [check for check in partly if re.search(launch.pattern, check.name)]


def launched(module, launches):
    """A module's checks in each of the launches that have it, to be the parameters `launch, check`."""
    return [
        pytest.param(launch, check, id=f"{launch} {check.name}")
        for launch in launches
        for check in checks_of(launch)
        if check.module == module
    ]


def begin(launch):
    """Starts a launch's selected checks, unless they have been; returns the Future of their Outcome."""
    if launch not in _outcomes:
        # One worker needs one core, and runs beside the others.
        pool = _one_worker if launch.workers == 1 else _several_workers
        checks = [check for check in checks_of(launch) if check in selected[launch]]
        _outcomes[launch] = pool.submit(run_checks, launch, checks)
    return _outcomes[launch]


@functools.cache
def begin_elastic(job):
    """Starts an elastic job, unless it has been; returns the Future of what run_elastic gives."""
    return _elastic.submit(run_elastic, job)


def stop():
    """Ends the launches that still run, and starts no more: where pytest was interrupted, or failed early."""
    for pool in (_one_worker, _several_workers, _elastic):
        pool.shutdown(wait=False, cancel_futures=True)
    for job in list(_running):
        kill(job)


def finished():
    """(launch, Outcome) of those that have run to their end."""
    ended = [(launch, future) for launch, future in _outcomes.items() if future.done() and not future.cancelled()]
    return [(launch, future.result()) for launch, future in ended if not future.exception()]


def run_checks(launch, checks):
    """The Outcome of these checks in the workers of a launch."""
    with tempfile.TemporaryDirectory() as folder:
        run_with = ["-m", "horovod_powersgd", "run", "--compression", launch.compression] if launch.compression else []
        program = [sys.executable, *run_with, str(HERE / "worker.py"), folder, str(CHECK_SECONDS), *map(str, checks)]
        command = launch_command(launch.launcher, launch.workers, program) if launch.launcher else program
        assert command is not None, f"{launch.launcher} is not installed"
        if launch.launcher == "horovodrun --gloo":
            command[:1] = [sys.executable, "-c", HOROVODRUN]
        if launch.launcher == "mpirun":
            command.insert(1, "--tag-output")  # as horovodrun does by itself
        # The tests that begin one after the other go first: launches fill what they leave of the cores.
        command = ["nice", *command]
        began = time.monotonic()
        output = run(command, LAUNCH_SECONDS, dict(launch.variables))
        starts, reports = [], {check: {} for check in checks}
        for file in Path(folder).glob("*.jsonl"):
            first, *others = map(json.loads, file.read_text().splitlines())
            starts.append(Report(**first["report"]))
            for line in others:
                reports[Check(*line["check"].split("."))][int(file.stem)] = Report(**line["report"])
        return Outcome(starts, reports, output, time.monotonic() - began)


# Several names of this machine stand for its hosts.
HOSTS, LATER = ("localhost", "127.0.0.1", "127.1"), "127.0.1"


def run_elastic(job):
    """What each worker of an elastic job reported, line by line; and all that they wrote."""
    with tempfile.TemporaryDirectory() as folder:
        discover = Path(folder) / "discover.sh"
        hosts = "\n".join(f"echo {host}:{job.per_host}" for host in HOSTS[: job.hosts])
        discover.write_text(f"#!/bin/sh\n{hosts}\n[ -e {folder}/grow ] && echo {LATER}:{job.per_host}\nexit 0\n")
        discover.chmod(0o755)
        workers = job.hosts * job.per_host
        command = [sys.executable, "-c", HOROVODRUN, "--gloo", "-np", workers, "--max-np", workers]
        command += ["--min-np", workers - job.per_host]
        command += ["--host-discovery-script", discover, "--disable-cache", "--elastic-timeout", "120"]
        command += [sys.executable, HERE / job.program, folder, job.kind]
        # The others wait that long for the new worker, which first imports its framework.
        environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "30", **dict(job.variables)}
        output = run([str(word) for word in command], 240, environment)
        files = Path(folder).glob("*.jsonl")
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files], output


def run(command, seconds, environment=None):
    """A job's output; it is ended with all its workers when it takes longer than it may."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "2",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_USE_LEGACY_KERAS": "0",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
        # Looking for messages each millisecond takes a worker that computes nothing a tenth of a core.
        "HOROVOD_CYCLE_TIME": "3",
    }
    environment = {**ENVIRONMENT, **settings, **(environment or {})}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _running.add(job)
    try:
        return job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill(job)
        return f"{job.communicate()[0]}\nended after {seconds} seconds: {' '.join(command)}"
    finally:
        _running.discard(job)


def kill(job):
    import psutil  # comes with Horovod, and only here is it needed

    if job.poll() is None:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            process.kill()


def assert_passed(launch, check):
    """Fails with the workers' assertions, then their tracebacks, then what all have written, which is shown once for a
    launch."""
    found = begin(launch).result()
    reports = found.reports[check]
    silent = [worker for worker in range(launch.workers) if worker not in reports]
    told = defaultdict(list)  # workers often fail alike
    for worker, report in sorted(reports.items()):
        if report.failure:
            told[report.failure].append(worker)
    if not told and not silent:
        return
    lines = [f"{check}, worker {numbers(workers)}: {where_and_what(failure)}" for failure, workers in told.items()]
    lines += [f"{check}, worker {numbers(silent)}: did not come through"] if silent else []
    lines += [f"\nworker {numbers(workers)}:\n{failure}" for failure, workers in told.items()]
    if found.explained is None:
        found.explained = check
        lines.append(f"\nall workers of {launch}:\n{found.output}")
    else:
        lines.append(f"What the workers wrote is shown with {found.explained}.")
    pytest.fail("\n".join(lines), pytrace=False)


def numbers(workers):
    return ", ".join(map(str, workers))


def where_and_what(failure):
    """The end of a traceback: the line of code that raised, and the error."""
    lines = failure.splitlines()
    last_call = max(i for i, line in enumerate(lines) if line.startswith('  File "'))
    return "\n".join(line for line in lines[last_call + 1 :] if line.strip(" ^~"))
