"""A job that was interrupted goes on in new processes as if it had not been."""

import sys

import torch

from horovod_powersgd.launcher import launch_command
from job import HERE, run


def test_ten_steps_and_ten_more_in_new_processes_are_twenty_bit_for_bit(tmp_path):
    for folder, first in (("whole", 0), ("parts", 10)):
        (tmp_path / folder).mkdir()
        # The parts begin with what the whole has left after ten steps.
        program = [sys.executable, str(HERE / "resumed_training.py"), str(tmp_path / "whole"), str(tmp_path / folder)]
        program.append(str(first))
        output = run(launch_command("mpirun", 2, program), 120)
        assert output.count("finished") == 2, output
    names = ["model-20.pt", "optimizer-20.pt", "compression-20-0.pt", "compression-20-1.pt"]
    for name in names:
        whole, parts = (list(tensors(torch.load(tmp_path / folder / name))) for folder in ("whole", "parts"))
        assert len(whole) == len(parts) > 0
        assert all(torch.equal(one, other) for one, other in zip(whole, parts)), name


def tensors(item):
    """All tensors in a nested dict."""
    if torch.is_tensor(item):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from tensors(value)
