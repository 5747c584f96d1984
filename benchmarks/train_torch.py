"""A worker of train.py: trains until a validation loss is reached."""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F

import horovod_powersgd.torch as hvd
from distribution import distribute
from methods import METHODS
from rounds import wire_bytes
from tasks import LARGEST_NORM, TASKS, WARMUP

PHASES = "forward", "backward", "wait", "update"
EVERY = 5  # steps, the validation loss is computed


def cross_entropy(model, inputs, labels):
    return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


class Training:
    """A worker's part of a training."""

    def __init__(self, key, task):
        self._uses_horovod, self._task = METHODS[key].uses_horovod, task
        self._worker, self._workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._train, self._valid = task.data()
        self._order = torch.Generator().manual_seed(0)  # the same on every worker
        self._plain = task.model()
        sgd = torch.optim.SGD(self._plain.parameters(), lr=task.learning_rate, momentum=0.9)
        self._model, self._optimizer = distribute(key, self._plain, sgd)
        self._steps = 0

    def step(self):
        """The seconds that each of PHASES took."""
        examples = torch.randint(len(self._train[0]), (self._task.batch,), generator=self._order)
        inputs, labels = self._mine(self._train, examples)
        self._steps += 1
        self._optimizer.param_groups[0]["lr"] = self._task.learning_rate * min(1, self._steps / WARMUP)
        marks = [time.perf_counter()]
        self._optimizer.zero_grad()
        loss = cross_entropy(self._model, inputs, labels)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if self._uses_horovod:
            self._optimizer.synchronize()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self._plain.parameters(), LARGEST_NORM)
        with self._optimizer.skip_synchronize() if self._uses_horovod else contextlib.nullcontext():
            self._optimizer.step()
        marks.append(time.perf_counter())
        return [end - begin for begin, end in zip(marks, marks[1:])]

    @torch.no_grad()
    def validate(self):
        """The validation loss, the same on every worker."""
        inputs, labels = self._mine(self._valid, torch.arange(len(self._valid[0])))
        self._plain.eval()
        loss = cross_entropy(self._plain, inputs, labels) * len(inputs) / len(self._valid[0])
        self._plain.train()
        torch.distributed.all_reduce(loss)
        return loss.item()

    def _mine(self, data, examples):
        mine = examples[self._worker :: self._workers]
        return data[0][mine], data[1][mine]


def train(training, target, most_steps):
    """Steps until the validation loss is down at the target; what they took, and the validation's curve."""
    phases, curve, wire = [], [], 0
    while len(phases) < most_steps:
        before = wire_bytes()
        phases += [training.step() for _ in range(EVERY)]
        wire += wire_bytes() - before
        loss = training.validate()
        curve.append([len(phases), round(sum(map(sum, phases)), 3), round(loss, 4)])
        if loss <= target:
            break
    return {
        "reached": loss <= target,
        "steps": len(phases),
        "seconds": curve[-1][1],
        "step_ms": round(1000 * statistics.median(map(sum, phases)), 1),
        "phases_ms": {name: round(1000 * statistics.median(p), 1) for name, p in zip(PHASES, zip(*phases))},
        "wire_bytes": round(wire / len(phases)),
        "curve": curve,
    }


def exchange_phases(training):
    """The parts of this package's exchange in a step, in ms, by its marks in PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(EVERY):
            training.step()
    marks = {event.key: event.cpu_time_total / 1000 / EVERY for event in profile.key_averages()}
    return {key.removeprefix("powersgd."): round(ms, 1) for key, ms in marks.items() if key.startswith("powersgd.")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--most-steps", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()

    hvd.init()
    worker = hvd.rank()
    torch.distributed.init_process_group("gloo", rank=worker, world_size=hvd.size())
    if not METHODS[args.method].uses_horovod:
        hvd.shutdown()  # its thread would take time from the others
    torch.set_num_threads(1)
    torch.manual_seed(0)  # so all workers start from the same model
    training = Training(args.method, TASKS[args.task])
    result = train(training, TASKS[args.task].target, args.most_steps)
    result["exchange_ms"] = exchange_phases(training)
    if worker == 0:
        args.results.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
