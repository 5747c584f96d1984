"""What Horovod takes of the processor while its workers wait: for each other's small tensors, and for nothing.

    mpirun -np 4 python benchmarks/waiting.py
    horovodrun -np 4 python benchmarks/waiting.py
"""

import time

import torch

import horovod_powersgd.torch as hvd

ROUNDS, IDLE_SECONDS = 500, 8


def clocks():
    return time.perf_counter(), time.process_time()


def main():
    hvd.init()
    tensor = torch.ones(10)
    hvd.allreduce(tensor, name="first")
    begin, cpu_begin = clocks()
    time.sleep(IDLE_SECONDS)
    idle, cpu_idle = clocks()
    for _ in range(ROUNDS):
        hvd.allreduce(tensor, name="round")
    end, cpu_end = clocks()
    round_ms, cpu_ms = 1000 * (end - idle) / ROUNDS, 1000 * (cpu_end - cpu_idle) / ROUNDS
    share = (cpu_idle - cpu_begin) / (idle - begin)
    for worker, found in enumerate(hvd.allgather_object((round_ms, cpu_ms, share))):
        if hvd.rank() == 0:
            line = "worker {}: {:.2f} ms a round, of them {:.2f} ms on a processor; idle, {:.2f} of one"
            print(line.format(worker, *found))


if __name__ == "__main__":
    main()
