"""The examples run, and say what they did."""

import json
import sys

import pytest

from horovod_powersgd.launcher import launch_command
from job import HERE, run

EXAMPLES = HERE.parent / "examples"


# With the epochs after which most digits are recognised: Keras's learning rate rises slowly.
DIGITS = {
    "PyTorch": ("torch_digits.py", 3, {}),
    "TensorFlow": ("tensorflow2_digits.py", 3, {}),
    "Keras 3": ("keras_digits.py", 5, {"TF_USE_LEGACY_KERAS": "0"}),
    "Keras 2": ("keras_digits.py", 5, {"TF_USE_LEGACY_KERAS": "1"}),
}


def last_line(example, *arguments, environment=None):
    """The result that an example prints at its end, in a job of two workers."""
    program = [sys.executable, str(EXAMPLES / example), *arguments]
    output = run(launch_command("mpirun", 2, program), 240, environment)
    results = [line for line in output.splitlines() if line.startswith('{"compression"')]
    assert len(results) == 1, output
    return json.loads(results[0])


RATIOS = {"none": 1, "fp16": 2, "powersgd": 42}
RUNS = [(framework, "powersgd") for framework in DIGITS] + [("PyTorch", "none"), ("TensorFlow", "fp16")]


@pytest.mark.parametrize("framework, compression", RUNS)
def test_digits(framework, compression, tmp_path):
    example, epochs, environment = DIGITS[framework]
    results = tmp_path / "results.json"
    arguments = ["--compression", compression, "--rank", "2", "--epochs", str(epochs), "--results", str(results)]
    result = last_line(example, *arguments, environment=environment)
    assert result == json.loads(results.read_text())
    assert result.keys() == {"compression", "rank", "test_accuracy", "bytes_per_epoch", "ratio", "ms_per_batch"}
    assert result["compression"] == compression and result["rank"] == (2 if compression == "powersgd" else None)
    assert int(result["ratio"]) == RATIOS[compression] and result["test_accuracy"] > 0.5  # guessing is right in 0.1
    assert result["bytes_per_epoch"] * result["ratio"] == pytest.approx(13_314_928)


@pytest.mark.parametrize("example", ["torch_cifar10.py", "torch_lm.py"])
def test_larger_examples_stop_and_resume(example, tmp_path):
    arguments = ["--batch-size", "2", "--max-steps", "2", "--amp", "--checkpoint-dir", str(tmp_path)]
    first = last_line(example, *arguments)
    assert first["compression"] == "powersgd" and first["ratio"] > 10
    assert list(tmp_path.iterdir())
    last_line(example, *arguments, "--resume")
