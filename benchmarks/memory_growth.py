"""How the error-feedback memory of a worker grows: by this package's rule, and by the averaged-Q rule.

    python benchmarks/memory_growth.py

It simulates the workers in numpy, prints a table, draws docs/memory.png and leaves the numbers in
results/memory_growth.json. It takes about half a minute on one core. The figure needs matplotlib:
pip install -e '.[benchmark]'
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from horovod_powersgd import PowerSGD, reference

WORKERS, SHAPE, RANK, STEPS = 4, (60, 40), 2, 5000
SCENARIOS = {
    "noise": "Random gradients",
    "offset": "Random gradients plus a fixed offset per worker",
}
TABLE_STEPS = (100, 1000, 5000)
EVERY = 50      # steps between two points of the curves in the file of results

REPOSITORY = Path(__file__).parent.parent
FIGURE = REPOSITORY / "docs" / "memory.png"
RESULTS = REPOSITORY / "results" / "memory_growth.json"
# Label, colour and line: Okabe and Ito's vermilion and blue, which the colour-blind tell apart.
STYLES = {
    "averaged": ("averaged Q", "#D55E00", "--"),
    "local": ("local (horovod-powersgd)", "#0072B2", "-"),
}


def gradients(scenario, steps, shape=SHAPE, seed=0):
    """Yields the gradients of each step, (WORKERS, *shape): standard normal noise, new in every step.

    In the scenario "offset", each worker adds a standard normal matrix of its own, the same in every step: its data
    differ from the others'.
    """
    rng = np.random.default_rng(seed)
    offsets = rng.standard_normal((WORKERS, *shape)) * (scenario == "offset")
    for _ in range(steps):
        yield offsets + rng.standard_normal((WORKERS, *shape))


def memories(rule, run, rank=RANK):
    """Yields the workers' memories after each step of a run, (WORKERS, *shape).

    Args:
        rule: "local", this package's: e_w = delta_w - P^ Q_w^T, from the worker's own Q_w;
            "averaged": e_w = delta_w - P^ Q^T, from the averaged Q.
        run: the gradients of each step, (WORKERS, *shape).
    """
    config = PowerSGD(rank=rank, min_compression_rate=0)
    states = [reference.State() for _ in range(WORKERS)]
    for step in run:
        deltas = [gradient + state.memory.get("w", 0) for gradient, state in zip(step, states)]
        updates = reference.simulate([{"w": gradient} for gradient in step], states, config)
        if rule == "averaged":
            for state, delta, update in zip(states, deltas, updates):
                state.memory["w"] = delta - update["w"]     # the update is P^ Q^T
        yield np.stack([state.memory["w"] for state in states])


def norms(matrices):
    """The Frobenius norm of each worker's memory, (WORKERS,)."""
    return np.linalg.norm(matrices, axis=(1, 2))


def measure(scenario, rule):
    """One run's curves, and how large the mean memory is at its end with all workers, and without the last one."""
    points = {}
    for step, matrices in enumerate(memories(rule, gradients(scenario, STEPS)), start=1):
        if step == 1 or step % EVERY == 0:
            points[step] = [round(norm, 2) for norm in norms(matrices).tolist()]
    return {
        "scenario": scenario,
        "rule": rule,
        "steps": list(points),
        "norms": list(points.values()),
        "mean_memory": round(float(np.linalg.norm(matrices.mean(axis=0))), 2),
        "mean_memory_without_last_worker": round(float(np.linalg.norm(matrices[:-1].mean(axis=0))), 2),
    }


def print_table(runs):
    print(f"|e_w|, the largest of {WORKERS} workers; {SHAPE[0]} x {SHAPE[1]} matrix, rank {RANK}\n")
    row = "{:<48}{:<10}" + "{:>12}" * len(TABLE_STEPS)
    print(row.format("scenario", "rule", *(f"step {step:,}" for step in TABLE_STEPS)))
    for run in runs:
        found = [max(run["norms"][run["steps"].index(step)]) for step in TABLE_STEPS]
        print(row.format(SCENARIOS[run["scenario"]], run["rule"], *(f"{norm:,.0f}" for norm in found)))
    print(f"\n|mean of e_w| after step {STEPS:,}\n")
    row = "{:<48}{:<10}{:>12}{:>18}"
    print(row.format("scenario", "rule", "all workers", "without the last"))
    for run in runs:
        found = run["mean_memory"], run["mean_memory_without_last_worker"]
        print(row.format(SCENARIOS[run["scenario"]], run["rule"], *(f"{norm:,.0f}" for norm in found)))


def draw(runs, path):
    """A panel per scenario, with a line per worker and rule."""
    import matplotlib
    from PIL import Image

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SCENARIOS), figsize=(9, 3.6), dpi=110, layout="constrained")
    for panel, (scenario, title) in zip(panels, SCENARIOS.items()):
        for run in runs:
            if run["scenario"] == scenario:
                label, color, line = STYLES[run["rule"]]
                lines = panel.plot(run["steps"], run["norms"], color=color, linestyle=line, linewidth=1.2)
                lines[0].set_label(label)
        panel.set(title=title, xlabel="step", ylabel="memory $|e_w|$, a line per worker", xlim=(0, STEPS), ylim=0)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    figure.canvas.draw()
    # 32 colours are enough, and make a small file.
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(32).save(path, optimize=True)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("The figure needs matplotlib. Run: pip install -e '.[benchmark]'")
    runs = [measure(scenario, rule) for scenario in SCENARIOS for rule in STYLES]
    print_table(runs)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"workers": WORKERS, "shape": SHAPE, "rank": RANK, "runs": runs}) + "\n")
    draw(runs, FIGURE)
    print(f"\nalso in {RESULTS.relative_to(REPOSITORY)} and {FIGURE.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
