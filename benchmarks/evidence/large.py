"""Trains an LSTM of the PowerSGD paper's size, and a transformer, for thousands of steps on one GPU, by several methods
at the same time, and prints the validation perplexities.

    python benchmarks/evidence/large.py --models lstm transformer --methods none rank-4 rank-8-int8
    python benchmarks/evidence/large.py --methods none --rates 0.5 1 2     # learning rates, in multiples of the default

Every method but none has two workers, which share the GPU and half of each batch; none, which would average what they
have, has one with all of it. What is learned are the words of the Python sources in --sources, by default those of the
installed torch package; every 50th file validates. Results are left in results/evidence/large.json.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path += map(str, (HERE.parent, HERE.parents[1] / "examples"))

from torch_lm import numbered  # noqa: E402

from compressions import METHODS  # noqa: E402
from horovod_powersgd.launcher import launch_command, launch_environment  # noqa: E402
from large_worker import LEARNERS, VOCABULARY  # noqa: E402

RESULTS = HERE.parents[1] / "results" / "evidence" / "large.json"
HELD_EVERY = 50


def words(folder, most):
    """The sources' words as numbers by frequency, 0 for those that are rare: those to learn, and those to validate."""
    parts = [], []
    for number, file in enumerate(sorted(folder.rglob("*.py"))):
        part = parts[number % HELD_EVERY == 0]
        part += re.findall(r"\w+|[^\w\s]|\n", file.read_text(encoding="utf-8", errors="replace"))
    parts = [part[:most] for part in parts]
    return numbered(parts, VOCABULARY)[0]


def train(run, folder):
    """A training; what the first worker leaves, or what it printed."""
    workers = 1 if run["method"] == "none" else 2
    name = "-".join(map(str, run.values()))
    file, output = folder / f"{name}.json", folder / f"{name}.txt"
    program = [sys.executable, str(HERE / "large_worker.py"), json.dumps(run), str(folder), str(file)]
    with open(output, "w") as log:
        environment = {**launch_environment(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = launch_command("horovodrun --gloo", workers, program)
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        print(output.read_text()[-3000:], file=sys.stderr)
    return run | {"workers": workers} | (json.loads(file.read_text()) if file.exists() else {"failed": True})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["none", "rank-4", "rank-8-int8"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="in place of each model's own number")
    parser.add_argument("--most-words", type=int)
    parser.add_argument("--sources", type=Path, default=Path(importlib.util.find_spec("torch").origin).parent)
    args = parser.parse_args()
    runs = [
        {"model": model, "method": method, "rate": rate, "seed": seed, "steps": args.steps or LEARNERS[model].steps}
        for seed, model, rate, method in itertools.product(args.seeds, args.models, args.rates, args.methods)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, part in zip(("train", "valid"), words(args.sources, args.most_words)):
            np.save(Path(folder, f"{name}.npy"), part)
            print(f"{len(part):,} words to {name}", flush=True)
        with ThreadPoolExecutor(len(runs)) as pool:
            rows = list(pool.map(lambda run: train(run, Path(folder)), runs))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"cores": len(os.sched_getaffinity(0)), "rows": rows}, indent=1) + "\n")
    for row in rows:
        what = f"{row['model']:<12} {METHODS[row['method']].title:<28} rate {row['rate']:<5} seed {row['seed']}"
        if "failed" in row:
            print(f"{what} failed")
        else:
            print(
                f"{what} perplexity {row['perplexity']:.2f}, {row['megabytes']:.2f} MB and {row['ms']:.1f} ms a step, "
                f"clipped to {row['clipped_to']:.2f} in the mean"
            )


if __name__ == "__main__":
    main()
