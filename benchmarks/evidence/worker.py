"""A worker of these measurements: trains with one method after the other, in one launch (runs.py starts it)."""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

import horovod_powersgd.torch as hvd

sys.path.append(str(Path(__file__).parents[1]))

from compressions import METHODS, Model  # noqa: E402
from learners import LEARNERS  # noqa: E402
from rounds import of_each, step_ms, wire_bytes  # noqa: E402


class Training:
    """A worker's part of one training."""

    def __init__(self, run, folder, whole):
        self._method = METHODS[run["method"]]
        self._learner = LEARNERS[run["learner"]](folder, whole, run["seed"], run.get("times", 1))
        self._interval = self._learner.steps_per_epoch // self._learner.recipe.evaluations
        self._recipe, self._parameters = self._learner.recipe, list(self._learner.model.parameters())
        sgd = torch.optim.SGD(
            self._groups(run.get("rate", 1)),
            self._recipe.rate,
            self._recipe.momentum,
            weight_decay=self._recipe.weight_decay,
        )
        self._optimizer = hvd.DistributedOptimizer(
            sgd, self._learner.model.named_parameters(), compression=self._compression()
        )
        self._curve, self._seconds, self._wire = [], [], 0
        self._begin, self._busy = time.perf_counter(), busy_seconds()

    def _groups(self, factor):
        """The parameters, with the factors that their learning rates have."""
        if not self._method.signs:
            return [{"params": self._parameters, "factor": factor}]
        # Signs have a momentum of their own. Vectors are not compressed, and learned as ever.
        vectors = {"params": [p for p in self._parameters if p.dim() < 2], "factor": 1}
        matrices = [p for p in self._parameters if p.dim() >= 2]
        return [vectors, {"params": matrices, "factor": factor * self._method.rate, "momentum": 0.0}]

    def _compression(self):
        if isinstance(self._method.compression, str):
            return getattr(hvd.Compression, self._method.compression)
        shapes = [tuple(parameter.shape) for parameter in self._parameters]
        return self._method.compression(Model(shapes, interval=self._interval))

    def run(self, target):
        """Trains for all epochs, or until the quality reaches the target, if there is one."""
        steps = 0
        for epoch in range(self._recipe.epochs):
            before = wire_bytes()
            for loss in self._learner.losses(epoch):
                steps += 1
                rate = self._recipe.rate_at(steps / self._learner.steps_per_epoch)
                self._seconds.append(self._step(loss, rate))
                if steps % self._interval == 0:
                    self._wire += wire_bytes() - before
                    quality = self._learner.quality()
                    self._curve.append([steps, round(sum(self._seconds), 3), round(quality, 3)])
                    before = wire_bytes()
                    if target is not None and (quality - target) * (1 if self._learner.higher_is_better else -1) >= 0:
                        return
            self._wire += wire_bytes() - before

    def _step(self, loss, rate):
        """The seconds that a step takes."""
        begin = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self._optimizer.zero_grad()
        loss().backward()
        self._optimizer.synchronize()
        if not self._method.signs:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.largest_norm)
        with self._optimizer.skip_synchronize():
            self._optimizer.step()
        return time.perf_counter() - begin

    def results(self):
        """Gathered from all workers, and the same on each of them."""
        steps, per_epoch = len(self._seconds), self._learner.steps_per_epoch
        milliseconds = step_ms(hvd.allgather_object(self._seconds))
        wire = of_each(hvd.allgather_object(self._wire))
        numbers = sum(parameter.numel() for parameter in self._parameters)
        found = {
            "quality": self._curve[-1][2],
            "steps": steps,
            "steps_per_epoch": per_epoch,
            "seconds": self._curve[-1][1],
            "step_ms": round(statistics.median(milliseconds), 2),
            "parameters": numbers,
            "bytes_per_epoch": 4 * numbers * per_epoch // (2 if self._method.compression == "fp16" else 1),
            "wire_bytes_per_epoch": round(wire / steps * per_epoch),
            "others": busy_others(self._busy, time.perf_counter() - self._begin),
            "curve": self._curve,
        }
        if hasattr(self._optimizer, "compression_stats"):
            stats = self._optimizer.compression_stats()
            found["bytes_per_epoch"] = round(stats.total_bytes_sent / stats.steps * per_epoch)
            decisions = [getattr(tensor, "decisions", ()) for tensor in stats.tensors]
            found["memory"] = self._memory()
            found["decisions"] = [list(decision) for decision in decisions if decision]
        return found

    def _memory(self):
        """The norm of all that the error-feedback memories hold, the mean of the workers'."""
        tensors = self._optimizer.compression_state_dict()["tensors"].values()
        memories = [state["memory"].norm().item() for state in tensors if state.get("memory") is not None]
        return round(statistics.mean(hvd.allgather_object(math.hypot(*memories))), 4)


def busy_seconds():
    """Of all cores so far, in this process and in all of them."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return sum(os.times()[:2]), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def busy_others(before, seconds):
    """How many cores others than the workers have kept busy, since busy_seconds() gave `before`, seconds ago."""
    ours, everyones = (now - then for now, then in zip(busy_seconds(), before))
    return round((everyones - sum(hvd.allgather_object(ours))) / seconds, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="a file: a list of what to train")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)
    runs, rows = json.loads(args.runs.read_text()), []
    for run in runs:
        training = Training(run, args.data, args.whole)
        training.run(run.get("target"))
        rows.append(run | training.results())
        if hvd.rank() == 0:
            print_row(rows[-1])
            args.results.write_text(json.dumps(rows))


def print_row(row):
    name, measure = METHODS[row["method"]].title, {"cnn": "accuracy", "lstm": "perplexity"}[row["learner"]]
    print(
        f"{row['learner']:<6}seed {row['seed']}  {name:<42}{measure} {row['quality']:6.2f}"
        f"{row['bytes_per_epoch'] / 1e6:10.2f} MB an epoch{row['step_ms']:8.1f} ms a step{row['seconds']:8.1f} s"
        f"{row['others']:8.2f} cores busy with other things",
        flush=True,
    )


if __name__ == "__main__":
    main()
