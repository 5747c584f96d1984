"""The examples run, and say what they did."""

import json
import sys

import pytest
from job import HERE, run

from horovod_powersgd.launcher import launch_command

EXAMPLES = HERE.parent / "examples"


def last_line(example, *arguments):
    """The result that an example prints at its end, in a job of two workers."""
    program = [sys.executable, str(EXAMPLES / example), *arguments]
    output = run(launch_command("mpirun", 2, program), 240)
    results = [line for line in output.splitlines() if line.startswith('{"compression"')]
    assert len(results) == 1, output
    return json.loads(results[0])


@pytest.mark.parametrize("compression, ratio", [("none", 1), ("fp16", 2), ("powersgd", 42)])
def test_digits(compression, ratio, tmp_path):
    results = tmp_path / "results.json"
    arguments = ["--compression", compression, "--rank", "2", "--epochs", "3", "--results", str(results)]
    result = last_line("torch_digits.py", *arguments)
    assert result == json.loads(results.read_text())
    assert result.keys() == {"compression", "rank", "test_accuracy", "bytes_per_epoch", "ratio", "ms_per_batch"}
    assert result["compression"] == compression and result["rank"] == (2 if compression == "powersgd" else None)
    assert int(result["ratio"]) == ratio and result["test_accuracy"] > 0.5  # guessing is right in 0.1
    assert result["bytes_per_epoch"] * result["ratio"] == pytest.approx(13_314_928)


@pytest.mark.parametrize("example", ["torch_cifar10.py", "torch_lm.py"])
def test_larger_examples_stop_and_resume(example, tmp_path):
    arguments = ["--batch-size", "2", "--max-steps", "2", "--amp", "--checkpoint-dir", str(tmp_path)]
    first = last_line(example, *arguments)
    assert first["compression"] == "powersgd" and first["ratio"] > 10
    assert list(tmp_path.iterdir())
    last_line(example, *arguments, "--resume")
