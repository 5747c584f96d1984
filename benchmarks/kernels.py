"""Times compression and decompression alone, one thread, against a plain copy of the gradient.

    python benchmarks/kernels.py

A step goes over a gradient three times: it adds the memory and makes P, it makes Q, it writes the update. Between two
steps copies are timed, on the same memory. The numbers are left in results/kernels.json. It takes about a minute.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from horovod_powersgd.torch.kernels import HalfStep, Memory, Product, half_steps, products

RESULTS = Path(__file__).parent.parent / "results" / "kernels.json"
# The first two are larger than most caches, and what the targets are for.
SHAPES = {
    "LSTM, embedding": (28869, 650),
    "GPT-2 small, embedding": (50257, 768),
    "LSTM, weights": (2600, 650),
    "GPT-2 small, feed-forward": (3072, 768),
    "ResNet-18, convolution": (512, 4608),
}
RANKS = 1, 2, 4, 8, 32
PASSES = "memory and P", "Q", "update"
ROUNDS = 15
ROW = "{:<28}{:>14}{:>6}{:>10}   {:<36}{:>8}{:>16}"


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(shape, rank):
    """Medians over the rounds: of a copy in ms, and of each pass and of all of them in copies of the same round."""
    n, m = shape
    gradient, delta, other = torch.randn(n, m), torch.randn(n, m), torch.empty(n, m)
    # So small that the gradient, which is not renewed, does not grow beyond all bounds.
    p, q, basis = 1e-6 * torch.randn(rank, n), torch.randn(rank, m), torch.randn(rank, m)
    memory = Memory(delta, p, q)
    passes = (
        lambda: half_steps([HalfStep(gradient, basis, False, memory)]),
        lambda: half_steps([HalfStep(gradient, p, True)]),
        lambda: products([Product(p, q, other)]),
    )
    copies, rounds = [], []
    for _ in range(ROUNDS + 1):
        # Small matrices are done so quickly that one copy is hard to time.
        copies.append(statistics.median(seconds(lambda: other.copy_(gradient)) for _ in range(5)))
        rounds.append([seconds(run) / copies[-1] for run in passes])
    rounds, copies = rounds[1:], copies[1:]
    low, median, high = statistics.quantiles(map(sum, rounds), n=4)
    return {
        "rank": rank,
        "shape": shape,
        "copy_ms": 1e3 * statistics.median(copies),
        "passes_in_copies": dict(zip(PASSES, map(statistics.median, zip(*rounds)))),
        "step_in_copies": median,
        "quartiles": [low, high],
    }


def main():
    torch.set_num_threads(1)
    print(ROW.format("matrix", "shape", "rank", "copy, ms", ", ".join(PASSES), "step", "quartiles"))
    rows = []
    for name, shape in SHAPES.items():
        for rank in RANKS:
            row = {"matrix": name, **measure(shape, rank)}
            rows.append(row)
            parts = ", ".join(f"{copies:.1f}" for copies in row["passes_in_copies"].values())
            spread = " to ".join(f"{copies:.1f}" for copies in row["quartiles"])
            size, copy = " x ".join(map(str, shape)), f"{row['copy_ms']:.2f}"
            print(ROW.format(name, size, rank, copy, parts, f"{row['step_in_copies']:.1f}", spread), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
