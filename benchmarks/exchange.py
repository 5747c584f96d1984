"""Times one exchange of a model's gradients, for several methods, models, links and numbers of hosts.

    python benchmarks/exchange.py                                   # a selection, in about 25 minutes on 2 cores
    python benchmarks/exchange.py --models lstm --methods hvd rank-4 --rates 1gbit 10gbit
    python benchmarks/exchange.py --all                             # every combination, in hours

Backward is almost free here: it copies given numbers into the gradients. Each worker runs one thread. The hosts are
those of cluster.py, which needs root; without it the workers share the loopback interface, and results say so.
Results are left in results/exchange.json.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cluster
from job import JobFailed, results
from methods import METHODS
from models import MODELS, parameters

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "exchange.json"
WORKERS = {"torch": HERE / "exchange_torch.py", "tensorflow": HERE / "exchange_tensorflow.py"}
TENSORFLOW_METHODS = ["no-exchange", "hvd", "hvd-fp16", "rank-4"]
LONGEST_STEP = 30  # seconds; what would take longer is left out
# Memory that a launch needs, in sizes of the model: what all methods share, and for each method of a library.
SHARED_MEMORY, METHOD_MEMORY = 2, {None: 0, "horovod": 1, "ddp": 3, "ours": 2.5}
ROW = "{:<12}{:<13}{:<10}{:>6}  {:<32}{:>12}{:>22}{:>14}{:>12}"


@dataclass(frozen=True)
class Job:
    """Methods that one launch compares.

    Attributes:
        framework: "torch" or "tensorflow".
        rate: of the links, one of cluster.RATES, or "loopback".
        hosts: how many.
        rounds: see rounds.py.
        per_host: how many workers share a host.
    """

    framework: str
    model: str
    rate: str
    hosts: int
    methods: tuple
    rounds: int
    launcher: str
    per_host: int = 1

    def row(self, method, **measured):
        place = {key: value for key, value in asdict(self).items() if key not in ("methods", "rounds")}
        return {**place, "method": method, **measured}


def selection(rounds, launcher):
    """The combinations that tell most: everything on 2 hosts with 1 Gbit/s, and what changes with links and hosts."""

    def job(framework, model, rate, hosts, methods, rounds=1):
        return Job(framework, model, rate, hosts, tuple(methods), rounds, launcher)

    on_one_level = [key for key in METHODS if "two-levels" not in key and key not in ("auto", "hvd-again")]
    yield from (job("torch", model, "1gbit", 2, on_one_level, rounds) for model in MODELS)
    for rate in ("100mbit", "10gbit", "unshaped"):
        methods = ["no-exchange", "hvd", "hvd-fp16", "rank-4", "rank-8-int8"]
        yield from (job("torch", model, rate, 2, methods) for model in MODELS)
    for model, hosts in itertools.product(["resnet18", "lstm"], [4, 8]):
        yield job("torch", model, "1gbit", hosts, ["no-exchange", "hvd", "ddp", "rank-4", "rank-8-int8"])
    yield from (job("tensorflow", model, "1gbit", 2, TENSORFLOW_METHODS) for model in MODELS)


def product(args):
    """Every combination of what the arguments say."""
    for framework, hosts, rate, model in itertools.product(args.frameworks, args.hosts, args.rates, args.models):
        methods = [m for m in args.methods if framework == "torch" or METHODS[m].library != "ddp"]
        if methods:
            yield Job(
                framework, model, rate, hosts, tuple(methods), args.rounds, args.launcher, args.workers_per_host
            )


def on_loopback(jobs):
    """The jobs without what only a cluster can tell."""
    seen = set()
    for job in jobs:
        job = replace(job, rate="loopback")
        if (job.framework, job.model, job.hosts) not in seen:
            seen.add((job.framework, job.model, job.hosts))
            yield job


def least_seconds(job, method):
    """What the links alone take for one of the method's steps.

    For DDP's compressor: for one of the plain steps that it begins with. What this package sends is not counted.
    """
    method = METHODS[method]
    ratio = method.numbers_ratio or (1 if method.library == "ddp" else math.inf)
    if method.library is None or job.rate == "loopback":
        return 0.0
    bits = 32 * parameters(job.model) / ratio
    return 2 * (job.hosts - 1) / job.hosts * bits / cluster.RATES[job.rate].bits


def launches(job):
    """The job in parts that fit into this machine's memory, each with "no-exchange" if the job has that."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    each = 0.8 * int(line.split()[1]) * 1024 / (job.hosts * job.per_host)
    models = each / (4 * parameters(job.model)) - SHARED_MEMORY
    part, needed = [], 0
    for method in job.methods:
        needed += METHOD_MEMORY[METHODS[method].library]
        if part and needed > models:
            yield replace(job, methods=tuple(part))
            part, needed = part[: part[0] == "no-exchange"], METHOD_MEMORY[METHODS[method].library]
        part.append(method)
    yield replace(job, methods=tuple(part))


def launch(job):
    """The results of one launch: a row for each method, with "error" in it where there is nothing better."""
    program = [WORKERS[job.framework], "--model", job.model, "--methods", *job.methods, "--rounds", job.rounds]
    links = sum(least_seconds(job, method) for method in job.methods)
    seconds = 300 + 60 * job.rounds + 5 * (5 + job.rounds) * links
    try:
        measured = results(program, job.hosts * job.per_host, job.launcher, seconds, job.per_host)
    except JobFailed as failure:
        return [job.row(method=method, error=str(failure)) for method in job.methods]
    return [job.row(**row) for row in measured]


def rows(job):
    """What became of each of the job's methods."""
    for method in job.methods:
        seconds = least_seconds(job, method)
        if seconds > LONGEST_STEP:
            yield job.row(method, left_out=f"a step takes at least {seconds:.0f} s")
    methods = tuple(method for method in job.methods if least_seconds(job, method) <= LONGEST_STEP)
    if methods:
        first, *others = launches(replace(job, methods=methods))
        yield from launch(first)
        for part in others:
            yield from (row for row in launch(part) if row["method"] != "no-exchange")


def print_row(row):
    found = row.get("left_out") or row.get("error")
    columns = [found, "", "", ""]
    if found is None:
        low, high = row["quartiles_ms"]
        wire = f"{row['wire_bytes'] / 1e6:.2f} MB"
        predicted = f"{row['predicted_ms']:.1f} ms" if "predicted_ms" in row else ""
        columns = f"{row['median_ms']:.1f} ms", f"{low:.1f} to {high:.1f}", wire, predicted
    place = row["framework"], row["model"], row["rate"], row["hosts"], METHODS[row["method"]].title
    print(ROW.format(*place, *columns), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=WORKERS)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--rates", nargs="+", choices=cluster.RATES)
    parser.add_argument("--hosts", nargs="+", type=int)
    parser.add_argument("--workers-per-host", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--launcher", choices=cluster.LAUNCHERS, default="mpirun")
    parser.add_argument("--all", action="store_true", help="every combination of what is not chosen")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = any([args.frameworks, args.models, args.methods, args.rates, args.hosts, args.workers_per_host > 1])
    args.frameworks = args.frameworks or (list(WORKERS) if args.all else ["torch"])
    args.models, args.methods = args.models or list(MODELS), args.methods or list(METHODS)
    args.rates = args.rates or (list(cluster.RATES) if args.all else ["1gbit"])
    args.hosts = args.hosts or ([2, 4, 8] if args.all else [2])
    jobs = product(args) if args.all or chosen else selection(args.rounds, args.launcher)

    obstacle = cluster.tell_missing()
    context = {"obstacle": obstacle, "cores": len(os.sched_getaffinity(0))}
    if obstacle is not None:
        jobs = on_loopback(jobs)
    columns = "framework", "model", "links", "hosts", "method", "median", "quartiles", "sent a step", "predicted"
    print(ROW.format(*columns))
    begin, found = time.time(), []
    args.results.parent.mkdir(exist_ok=True)
    for job in jobs:
        if obstacle is None:
            cluster.up(job.hosts, job.rate)
        for row in rows(job):
            found.append(row)
            print_row(row)
        args.results.write_text(json.dumps(context | {"rows": found}, indent=1) + "\n")
    print(f"\nalso in {args.results}, after {(time.time() - begin) / 60:.0f} minutes")
    sys.exit(any("error" in row for row in found))


if __name__ == "__main__":
    main()
