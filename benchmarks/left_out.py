"""Measures what is gained where some matrices travel as they are, while rank 8 compresses the others: on two hosts.

    python benchmarks/left_out.py     # in about a minute

The smallest ones are left out, whose passes take the longest for each byte.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import cluster
from job import results
from models import MODELS, TITLES

RATES = ["10gbit", "unshaped"]
PARTS = [0, 1 / 8, 1 / 4, 3 / 8, 1 / 2]  # of the matrices
ROUNDS, STEPS = 4, 12


def work(args):
    """What worker 0 leaves: (MB that are left out, ms of a step) of each part."""
    import torch

    import horovod_powersgd.torch as hvd
    from exchange_torch import exchanges, keep_memory

    keep_memory()
    hvd.init()
    [exchange] = exchanges(args.model, ["rank-8"]).values()
    exchange.step()
    engine = exchange._optimizer._engine
    shapes = {name: shape for name, shape in engine._gradients.shapes().items() if len(shape) > 1}
    smallest = sorted(shapes, key=lambda name: math.prod(shapes[name]))
    times = {round(part * len(smallest)): [] for part in PARTS}
    for count in list(times) * ROUNDS:
        engine._as_they_are = set(smallest[:count])
        exchange.step()
        begin = time.perf_counter()
        for _ in range(STEPS):
            exchange.step()
        taken = torch.tensor([(time.perf_counter() - begin) / STEPS])
        times[count].append(1e3 * hvd.allreduce(taken).item())
    megabytes = [4e-6 * sum(math.prod(shapes[name]) for name in smallest[:count]) for count in times]
    if hvd.rank() == 0:
        args.results.write_text(json.dumps([*zip(megabytes, map(statistics.median, times.values()))]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.results:
        return work(args)
    if cluster.tell_missing() is not None:
        return
    for model in ("resnet18", "resnet50"):
        for rate in RATES:
            cluster.up(2, rate)
            found = results([__file__, "--model", model], 2, "mpirun", 300)
            steps = ", ".join(f"{ms:.1f} ms ({megabytes:.1f} MB)" for megabytes, ms in found)
            print(f"{TITLES[model]}, {rate}: {steps}", flush=True)


if __name__ == "__main__":
    main()
