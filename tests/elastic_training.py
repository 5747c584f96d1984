"""An elastic job: the workers of the last host kill themselves, the others go on and ask for a new host, and all end.

    elastic_training.py FOLDER SGD|AdamW|hierarchical|Auto

Each worker writes what it saw to FOLDER/<process>.jsonl. FOLDER/grow appears when the new worker is to come.
"""

import contextlib
import faulthandler
import json
import os
import sys
import time
from pathlib import Path

import torch

import horovod_powersgd.torch as hvd
from choices import looking_again

FOLDER, KIND = Path(sys.argv[1]), sys.argv[2]
STEPS, DIES_AT = 24, 8


def report(**seen):
    with open(FOLDER / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(seen) + "\n")


def norms(optimizer):
    tensors = optimizer.compression_state_dict()["tensors"].values()
    return [0.0 if t["memory"] is None else t["memory"].norm().item() for t in tensors if "memory" in t]


# A job that hangs tells where each of its workers waits.
faulthandler.dump_traceback_later(200)
hvd.init()
workers = hvd.size()
torch.manual_seed(hvd.rank())
model = torch.nn.Sequential(torch.nn.Linear(40, 48), torch.nn.Tanh(), torch.nn.Linear(48, 32))
if KIND == "AdamW":
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
else:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
compression = hvd.PowerSGD(rank=2, wire_dtype="int8")
if KIND == "AdamW":
    compression = hvd.Accordion(hvd.PowerSGD(rank=2), hvd.PowerSGD(rank=1), interval=3)
if KIND == "hierarchical":
    compression = hvd.PowerSGD(rank=2, hierarchical=True)
if KIND == "Auto":
    compression = hvd.Auto(hvd.PowerSGD(rank=2), hvd.Compression.fp16)
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), compression=compression
)


@hvd.elastic.run
def train(state):
    hvd.assert_replicas_equal(model)
    report(event="start", rank=hvd.rank(), size=hvd.size(), step=state.step, memory=norms(optimizer))
    while state.step < STEPS:
        if state.step == DIES_AT and hvd.size() == workers and hvd.cross_rank() == hvd.cross_size() - 1:
            report(event="dies")
            os._exit(1)
        optimizer.zero_grad()
        data = torch.randn(8, 40, generator=torch.Generator().manual_seed(100 * state.step + hvd.rank()))
        model(data).square().mean().backward()
        optimizer.step()
        state.step += 1
        hvd.assert_replicas_equal(model)
        flat_because = optimizer.compression_stats().flat_because
        report(event="step", step=state.step, size=hvd.size(), memory=norms(optimizer), flat_because=flat_because)
        if state.step == DIES_AT + 4 and hvd.rank() == 0:
            (FOLDER / "grow").touch()
        state.commit()
        # The new worker comes while these wait.
        while DIES_AT + 4 <= state.step and hvd.size() < workers:
            time.sleep(0.3)
            state.check_host_updates()


# Auto tries and measures all the time, so that workers go and come meanwhile.
with looking_again if KIND == "Auto" else contextlib.nullcontext():
    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
hvd.assert_replicas_equal(model)
stats = optimizer.compression_stats()
told = {"decisions": [t.decisions for t in stats.tensors], "predicted": [t.predicted_step for t in stats.tensors]}
report(event="end", size=hvd.size(), exchanged=stats.steps, **told)
