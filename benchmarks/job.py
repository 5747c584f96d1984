"""Runs a job of workers that leave results in a file."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cluster


class JobFailed(Exception):
    """Says how."""


def results(program, workers, launcher, seconds, per_host=1):
    """What the workers leave in the file that --results names.

    Args:
        program: a Python script and its arguments.
        workers, launcher, per_host: as cluster.run's.
        seconds: after which the job is taken to hang.

    Raises:
        JobFailed: it did, or it hung. What it printed is printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, *map(str, program), "--results", str(file)]
        try:
            status, output = cluster.run(
                command, workers, launcher, seconds, per_host, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            failure = f"failed with exit status {status}"
        except subprocess.TimeoutExpired as hang:
            status, output = None, hang.output or b""
            failure = f"hung: it was ended after {seconds:.0f} seconds"
        if status == 0:
            return json.loads(file.read_text())
        print(f"{output.decode(errors='replace')}\n{' '.join(command)} {failure}", file=sys.stderr, flush=True)
        raise JobFailed(failure)
