"""A worker of region.py: times exchanges of models of several sizes."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import horovod_powersgd.torch as hvd  # noqa: E402
from exchange_torch import Exchange  # noqa: E402
from methods import METHODS  # noqa: E402
from region import MATRICES  # noqa: E402
from rounds import measure_rounds  # noqa: E402
from worker import busy_others, busy_seconds  # noqa: E402


def tensors(width):
    """(name, shape) of the parameters."""
    layers = [[(f"layer{i}.weight", (width, width)), (f"layer{i}.bias", (width,))] for i in range(MATRICES)]
    return [tensor for layer in layers for tensor in layer]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    rows = []
    for width in args.widths:
        gradients = [torch.randn(shape) for _, shape in tensors(width)]
        exchanges = {key: Exchange(key, tensors(width), gradients) for key in args.methods}
        begin, before = time.perf_counter(), busy_seconds()
        measured = measure_rounds(exchanges, args.rounds, hvd)
        others = busy_others(before, time.perf_counter() - begin)
        rows += [{"width": width, "others": others, **row} for row in measured]
    if hvd.rank() == 0:
        args.results.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
