"""The job that doctor runs under each launcher: two workers exchange a number, and check what comes back.

    horovodrun -np 2 python -m horovod_powersgd.environment.trial_job torch
"""

import importlib
import sys

from horovod_powersgd.environment.horovod_import import require_horovod
from horovod_powersgd.launcher import check_world, prepare_worker


def main(framework: str) -> None:
    """Run one worker.

    Raises:
        ImportError: Horovod does not serve the framework.
        RuntimeError: the workers are not one job, or what the exchange gave is wrong.
    """
    require_horovod(framework)
    hvd = importlib.import_module(f"horovod.{framework}")
    prepare_worker()
    hvd.init()
    check_world(hvd.size())
    if framework == "torch":
        import torch

        mine = torch.full((3,), hvd.rank() + 1.0)
        total = hvd.allreduce(mine, op=hvd.Sum, name="doctor")
    else:
        import tensorflow

        with tensorflow.device("CPU:0"):
            mine = tensorflow.fill((3,), hvd.rank() + 1.0)
            total = hvd.allreduce(mine, op=hvd.Sum, name="doctor")
    expected = hvd.size() * (hvd.size() + 1) / 2
    if total.numpy().tolist() != [expected] * 3:
        raise RuntimeError(f"the allreduce of {hvd.size()} workers gave {total.numpy().tolist()}, not {expected}")
    if hvd.size() != 2:
        raise RuntimeError(f"the job has {hvd.size()} workers, not 2")
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
