"""Trains from a step to the 20th, from files to files; one file of compression state for each worker.

    resumed_training.py FROM_FOLDER TO_FOLDER FIRST_STEP

After 10 steps it leaves files, too.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import horovod_powersgd.torch as hvd

FROM, TO, FIRST = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

hvd.init()
torch.manual_seed(FIRST + hvd.rank())
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 20))
optimizer = hvd.DistributedOptimizer(
    torch.optim.AdamW(model.parameters(), lr=0.01),
    named_parameters=model.named_parameters(),
    compression=hvd.Accordion(hvd.PowerSGD(rank=2), hvd.PowerSGD(rank=1), interval=4),
)
if FIRST:
    model.load_state_dict(torch.load(FROM / f"model-{FIRST}.pt"))
    optimizer.load_state_dict(torch.load(FROM / f"optimizer-{FIRST}.pt"))
    optimizer.load_compression_state_dict(torch.load(FROM / f"compression-{FIRST}-{hvd.rank()}.pt"))
else:
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
for step in range(FIRST, 20):
    images = np.random.default_rng([step, hvd.rank()]).standard_normal((4, 3, 8, 8)).astype("float32")
    optimizer.zero_grad()
    model(torch.from_numpy(images)).square().mean().backward()
    optimizer.step()
    done = step + 1
    if done % 10 == 0:
        hvd.assert_replicas_equal(model)
        if hvd.rank() == 0:
            torch.save(model.state_dict(), TO / f"model-{done}.pt")
            torch.save(optimizer.state_dict(), TO / f"optimizer-{done}.pt")
        torch.save(optimizer.compression_state_dict(), TO / f"compression-{done}-{hvd.rank()}.pt")
print("finished", flush=True)
