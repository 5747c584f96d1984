"""A worker of gpu.py: exchanges a model's gradients, which are on the GPU that all share, by several methods."""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.distributed
from torch.profiler import ProfilerActivity, profile

import horovod_powersgd.torch as hvd
from device_clock import milliseconds
from exchange_torch import exchanges
from methods import METHODS
from models import MODELS, parameters
from rounds import step_ms

SECONDS = 2.0  # that a method gets
MOST_STEPS = 50
# What makes the host wait for the device, by the names of CUDA's functions.
WAITS = "cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"
LAUNCHES = "cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC"


def counted(exchange):
    """How often a step makes the host wait, and how many kernels it starts."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        exchange.step()
    counts = {event.key: event.count for event in trace.key_averages()}
    return {
        "waits": sum(counts.get(name, 0) for name in WAITS),
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    hvd.init()
    rows = []
    for key in args.methods:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with torch.device("cuda"):
            [exchange] = exchanges(args.model, [key]).values()
        for _ in range(max(4, METHODS[key].first_steps)):  # one step says little of the kernels that are started
            exchange.step()
        torch.cuda.reset_peak_memory_stats()
        slowest = max(hvd.allgather_object(sum(milliseconds([exchange.step]))))
        steps = min(MOST_STEPS, max(3, round(1000 * SECONDS / slowest)))
        everyone = hvd.allgather_object([ms / 1000 for ms in milliseconds([exchange.step] * steps)])
        rows.append(
            {
                "method": key,
                "median_ms": statistics.median(step_ms(everyone)),
                "peak": (torch.cuda.max_memory_allocated() - before) / (4 * parameters(args.model)),
                "bytes_sent": exchange.bytes_sent(),
                **counted(exchange),
            }
        )
        exchange.pause()
        del exchange
    if hvd.rank() == 0:
        args.results.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
