"""Launches trainings, and adds up what the seeds gave."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import cluster  # noqa: E402
from compressions import METHODS  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results" / "evidence"
WORKERS = 4
LEARNERS = {"cnn": "CNN", "lstm": "LSTM"}
QUALITY = {"cnn": "accuracy, %", "lstm": "perplexity"}
LONGEST_RUN = 600  # seconds
CROWDED = 0.3  # cores: where other processes kept more of them busy, a time counts only if there is no better one


def parse(description):
    """The arguments that these programs share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10 (for the CNN) or WikiText-2 (for the LSTM)")
    parser.add_argument("--whole", action="store_true", help="learn from all of it, on a larger machine, for hours")
    return parser.parse_args()


class Hosts:
    """Four hosts joined by links of a rate, or the loopback interface where there can be none."""

    def __enter__(self):
        self.obstacle, self._begin = cluster.tell_missing(), time.time()
        self._were_there = cluster.hosts()
        return self

    def train(self, runs, args, rate="1gbit", workers=WORKERS):
        """What became of each run: a list of dictionaries like those of `runs`, with results; fewer if it failed."""
        if self.obstacle is None:
            cluster.up(workers, rate)
        with tempfile.TemporaryDirectory() as folder:
            plan, found = Path(folder, "runs.json"), Path(folder, "results.json")
            plan.write_text(json.dumps(runs))
            command = [sys.executable, HERE / "worker.py", "--runs", plan, "--results", found]
            command += ["--data", args.data.resolve()] if args.data else []
            command += ["--whole"] if args.whole else []
            timeout = None if args.whole else 60 + LONGEST_RUN * len(runs)
            try:
                status, _ = cluster.run(list(map(str, command)), workers, timeout=timeout)
                failure = f"exit status {status}"
            except subprocess.TimeoutExpired:
                status, failure = None, "it hung"
            rows = json.loads(found.read_text()) if found.exists() else []
            if status != 0:
                print(f"{len(runs) - len(rows)} of {len(runs)} trainings are missing: {failure}", file=sys.stderr)
        links, data = rate if self.obstacle is None else "loopback", args.data.name if args.data else None
        return [row | {"links": links, "data": data} for row in rows]

    def keep(self, name, rows):
        """Leaves results/evidence/NAME.json; the minutes since the hosts were asked for."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        minutes = round((time.time() - self._begin) / 60, 1)
        context = {"minutes": minutes, "cores": len(os.sched_getaffinity(0)), "obstacle": self.obstacle}
        (RESULTS / f"{name}.json").write_text(json.dumps(context | {"rows": rows}, indent=1) + "\n")
        return minutes

    def __exit__(self, *failure):
        if self.obstacle is None and not self._were_there:
            cluster.down()


def plan(args, methods):
    """Every method in turn, then the next seed: what disturbs the machine for a while disturbs all methods.

    Args:
        methods: a list, or one for each learner.
    """
    return [
        {"learner": learner, "method": method, "seed": seed}
        for learner in args.learners
        for seed in range(args.seeds)
        for method in (methods[learner] if isinstance(methods, dict) else methods)
        if args.methods is None or method in args.methods
    ]


def measure(name, args, methods, rate="1gbit", times=1):
    """Trains with each method, some times longer, prints the table, and leaves results/evidence/NAME.json."""
    with Hosts() as hosts:
        rows = hosts.train([run | {"times": times} for run in plan(args, methods)], args, rate)
        minutes = hosts.keep(name, rows)
    print_table(rows)
    print(f"\nalso in {RESULTS / name}.json, after {minutes} minutes")


def summaries(rows):
    """{(learner, method): its rows}, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["learner"], row["method"]), []).append(row)
    return groups


def calm(rows):
    """The rows whose times nobody disturbed."""
    return [row for row in rows if row["others"] < CROWDED]


def spread(values, digits=1):
    """Mean and standard deviation, for a table."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def print_table(rows):
    line = "{:<6}{:<42}{:>18}{:>14}{:>14}{:>18}"
    print("\n" + line.format("", "", "quality", "MB an epoch", "of it left", "ms a batch"))
    for (learner, method), group in summaries(rows).items():
        sent, wire = (
            statistics.mean(row[key] for row in group) / 1e6 for key in ("bytes_per_epoch", "wire_bytes_per_epoch")
        )
        quality, times = spread([row["quality"] for row in group], 2), spread([row["step_ms"] for row in group])
        print(line.format(learner, METHODS[method].title, quality, f"{sent:.2f}", f"{wire:.2f}", times))
