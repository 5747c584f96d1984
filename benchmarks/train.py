"""Trains to a given validation loss with several methods of exchanging gradients, and tells the time that it took.

    python benchmarks/train.py                                      # 2 hosts, 1 Gbit/s, in about 10 minutes on 2 cores
    python benchmarks/train.py --tasks lstm --methods hvd rank-4 --rates 100mbit 10gbit

Forward and backward are real here, with one thread a worker; data, batches and learning rates are the same for every
method. The hosts are those of cluster.py, which needs root; without it the workers share the loopback interface, and
results say so. Results are left in results/train.json.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import cluster
from job import JobFailed, results
from methods import METHODS
from tasks import TASKS

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "train.json"
MOST_STEPS = 300
TIMEOUT = 1200  # seconds, of a training
ROW = "{:<22}{:<10}{:>6}  {:<32}{:>8}{:>10}{:>12}    {}"


def columns(row):
    place = TASKS[row["task"]].title, row["rate"], row["hosts"], METHODS[row["method"]].title
    if "error" in row:
        return *place, "", "", "", row["error"]
    phases = ", ".join(f"{phase} {ms:.0f}" for phase, ms in row["phases_ms"].items())
    end = f"{row['seconds']:.1f} s" if row["reached"] else "never"
    return *place, row["steps"], end, f"{row['step_ms']:.0f} ms", phases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["hvd", "hvd-fp16", "ddp-rank-4", "rank-4"])
    parser.add_argument("--rates", nargs="+", choices=cluster.RATES, default=["1gbit"])
    parser.add_argument("--hosts", nargs="+", type=int, default=[2])
    parser.add_argument("--launcher", choices=cluster.LAUNCHERS, default="mpirun")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    obstacle = cluster.tell_missing()
    context = {"obstacle": obstacle, "cores": len(os.sched_getaffinity(0))}
    if obstacle is not None:
        args.rates = ["loopback"]
    print(ROW.format("training", "links", "hosts", "method", "steps", "to target", "step", "of it, in ms"))
    found = []
    args.results.parent.mkdir(exist_ok=True)
    for task, hosts, rate, method in itertools.product(args.tasks, args.hosts, args.rates, args.methods):
        if obstacle is None:
            cluster.up(hosts, rate)
        program = [HERE / "train_torch.py", "--task", task, "--method", method, "--most-steps", MOST_STEPS]
        row = {"task": task, "rate": rate, "hosts": hosts, "launcher": args.launcher, "method": method}
        try:
            row |= results(program, hosts, args.launcher, TIMEOUT)
        except JobFailed as failure:
            row["error"] = str(failure)
        found.append(row)
        print(ROW.format(*columns(row)), flush=True)
        args.results.write_text(json.dumps(context | {"rows": found}, indent=1) + "\n")
    print(f"\nalso in {args.results}")
    sys.exit(any("error" in row for row in found))


if __name__ == "__main__":
    main()
