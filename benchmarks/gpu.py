"""Checks and measures what a GPU does, and prints a page: docs/gpu.md has one.

    python benchmarks/gpu.py

It needs one NVIDIA GPU, PyTorch for CUDA, Horovod (python -m horovod_powersgd install-horovod) and pytest, and takes
about five minutes. Two workers share the GPU: NCCL refuses that, so Horovod has to be built without
HOROVOD_GPU_OPERATIONS, and averages through the host's memory. The numbers are left in results/gpu.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from device_clock import milliseconds
from horovod_powersgd.launcher import launch_command, launch_environment
from horovod_powersgd.torch.grouped_kernels import half_steps, keep_all, orthogonalize, products
from horovod_powersgd.torch.half_memory import Drawn, HalfMemory, Keep
from horovod_powersgd.torch.kernels import HalfStep, Memory, Product
from job import JobFailed, results
from kernels import PASSES, SHAPES
from methods import METHODS
from models import TITLES

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "gpu.json"
TESTS = HERE.parent / "tests"
# With how many workers each module's checks run.
MODULES = {
    "torch_checks": (1, 2),
    "torch_grouped_checks": (1,),
    "torch_gpu_checks": (1, 2),
    "torch_auto_checks": (2,),
    "torch_two_level_checks": (4,),
}
RANKS = 1, 2, 4, 8, 16, 32
ROUNDS = 30
WORKING_SET = 2**28  # bytes; larger than a GPU's cache
# That the device sleeps, while the host asks for what is timed.
CYCLES = 10_000_000
ALONE = ["no-exchange", "rank-4"]
TOGETHER = ["no-exchange", "hvd", "hvd-fp16", "ddp-rank-4", "rank-4", "rank-8-int8", "auto"]


def checked(module, workers):
    """Runs a module of tests with all tensors on the GPU.

    Returns:
        {check: whether it passed on all workers}, and the output where one did not.
    """
    lines = (TESTS / f"{module}.py").read_text().splitlines()
    checks = [f"{module}.{line[4:].split('(')[0]}" for line in lines if line.startswith("def check_")]
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(TESTS / "worker.py"), folder, "240", *checks]
        job = subprocess.run(
            launch_command("horovodrun --gloo", workers, program),
            env={**launch_environment(), "HOROVOD_POWERSGD_TEST_DEVICE": "cuda", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"},
            capture_output=True,
            text=True,
        )
        passed = dict.fromkeys(checks, 0)
        for report in Path(folder).glob("*.jsonl"):
            for line in map(json.loads, report.read_text().splitlines()):
                passed[line["check"]] = passed.get(line["check"], 0) + (line["report"]["failure"] is None)
    passed.pop(None, None)  # the workers' start
    found = {check: count == workers for check, count in passed.items()}
    return found, "" if all(found.values()) else job.stdout + job.stderr


def medians(runs):
    """Of the device's time of each of several functions, which run by turns."""
    times = []
    for _ in range(ROUNDS + 3):
        torch.cuda._sleep(CYCLES)
        times.append(milliseconds(runs))
    return [statistics.median(some) for some in zip(*times[3:])]


def measure_passes(shape, rank):
    """Medians of a copy in ms, and of each pass of a step in copies. So many matrices are gone over at once, as those
    of a bucket, that none of them is found in the GPU's cache."""
    n, m = shape
    count = max(1, WORKING_SET // (12 * n * m))
    gradients, deltas, others = ([torch.randn(n, m) for _ in range(count)] for _ in range(3))
    # So small that the gradients, which are not renewed, do not grow beyond all bounds.
    p, q = 1e-6 * torch.randn(rank, n), torch.randn(rank, m)
    spares = torch.randn(rank, n, dtype=torch.float64), torch.randn(rank, m, dtype=torch.float64)
    memories = [HalfStep(g, q, False, Memory(delta, p, q)) for g, delta in zip(gradients, deltas)]
    drawn = Drawn.of(0, shape, p.device)
    halves = [Keep(Memory(delta, p, q), drawn, torch.empty(n, m, dtype=torch.bfloat16)) for delta in deltas]
    from_halves = [HalfStep(g, q, False, HalfMemory(task.halves, g.dtype)) for g, task in zip(gradients, halves)]
    copy, *passes, keeping, from_kept = medians(
        [
            lambda: torch._foreach_copy_(others, gradients),
            lambda: half_steps(memories, torch.float32),
            lambda: half_steps([HalfStep(gradient, p, True) for gradient in gradients], torch.float32),
            lambda: products([Product(p, q, other) for other in others]),
            lambda: [orthogonalize([some] * count, [spare] * count) for some, spare in zip((p, q), spares)],
            lambda: keep_all(halves),
            lambda: half_steps(from_halves, torch.float32),
        ]
    )
    row = {"shape": shape, "rank": rank, "copy_ms": copy / count, "passes_in_copies": [some / copy for some in passes]}
    in_halves = sum(passes) + keeping + from_kept - passes[0]
    return {**row, "step_in_copies": sum(passes) / copy, "in_halves": in_halves / copy}


def exchange(model, methods, workers):
    """What gpu_exchange.py measures; nothing where the job failed, which is told on standard error."""
    program = [HERE / "gpu_exchange.py", "--model", model, "--methods", *methods]
    try:
        rows = results(program, workers, "horovodrun", seconds=240)
    except JobFailed:
        return []
    return [{"model": model, "workers": workers, **row} for row in rows]


def table(head, rows):
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def main():
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": [], "passes": []}
    print(f"# On a GPU: {found['device']}, PyTorch {torch.__version__}\n\n## Checks\n")
    for module, workers in ((module, workers) for module, some in MODULES.items() for workers in some):
        passed, output = checked(module, workers)
        found["checks"].append({"module": module, "workers": workers, **passed})
        of = f"{sum(passed.values())} of {len(passed)}"
        print(f"- {module}, {workers} worker{'s' * (workers > 1)}: {of} passed", flush=True)
        for check in (check for check, good in passed.items() if not good):
            print(f"  - failed: {check}")
        print(output, file=sys.stderr)

    print("\n## The passes over a gradient, in copies of it\n")
    for name, shape in SHAPES.items():
        for rank in RANKS:
            with torch.device("cuda"):
                found["passes"].append({"matrix": name, **measure_passes(shape, rank)})
    table(
        ["matrix", "shape", "rank", "a copy, ms", *PASSES, "orthogonalization", "step", "with bfloat16 memory"],
        [
            [
                row["matrix"], " x ".join(map(str, row["shape"])), str(row["rank"]), f"{row['copy_ms']:.3f}",
                *(f"{copies:.1f}" for copies in row["passes_in_copies"]), f"{row['step_in_copies']:.1f}",
                f"{row['in_halves']:.1f}",
            ]
            for row in found["passes"]
        ],
    )

    torch.cuda.empty_cache()
    for workers, methods in ((1, ALONE), (2, TOGETHER)):
        print(f"## An exchange with {workers} worker{'s' * (workers > 1)}\n")
        rows = [row for model in TITLES for row in exchange(model, methods, workers)]
        found[f"exchange_{workers}"] = rows
        table(
            ["model", "method", "ms", "MB sent", "kernels started", "waits for the device", "memory, in gradients"],
            [
                [
                    TITLES[row["model"]], METHODS[row["method"]].title, f"{row['median_ms']:.1f}",
                    "" if row["bytes_sent"] is None else f"{row['bytes_sent'] / 1e6:.2f}", str(row["launches"]),
                    str(row["waits"]), f"{row['peak']:.1f}",
                ]
                for row in rows
            ],
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
