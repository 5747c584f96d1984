"""Writes docs/benchmarks.md and its figures from what exchange.py, kernels.py and train.py left in results/.

    python benchmarks/report.py
"""

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from methods import METHODS
from models import MODELS, TITLES, parameters
from tasks import TASKS

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
RESULTS, DOCS = REPOSITORY / "results", REPOSITORY / "docs"
RATES = {
    "100mbit": "100 Mbit/s",
    "1gbit": "1 Gbit/s",
    "10gbit": "10 Gbit/s",
    "unshaped": "no limit",
    "loopback": "loopback",
}
FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
# Of the figures. Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = {
    "hvd": "#D55E00",
    "hvd-fp16": "#E69F00",
    "ddp": "#999999",
    "ddp-rank-4": "#CC79A7",
    "rank-4": "#0072B2",
}

GAINS_OVER = "hvd", "hvd-fp16", "ddp", "ddp-rank-4"

INTRODUCTION = """{place} The machine has {cores} cores, and each worker computes with one thread{crowd}. Methods take
turns in rounds; times are medians over the steps, of the workers' mean in each, with the quartiles in brackets where
more than one step was timed. What a worker sends is counted by its network interface, headers and all;
beside it, in brackets, is what compression_stats() says was handed to allreduce: of that, W workers send 2 (W - 1) / W.

"Horovod" is Horovod's own DistributedOptimizer, and "PowerSGD" is this package, under {launchers}. "DDP" is PyTorch's
DistributedDataParallel with Gloo, and its PowerSGD its own communication hook."""
CLUSTER = """Workers run on hosts that are network namespaces of one machine, joined by a bridge; each host's link is
limited in both directions."""
LOOPBACK = """**There was no cluster on this machine ({obstacle}): all workers share its loopback interface, and
under mpirun its memory. So these times show what the methods cost, and nothing of what a slow network does.**"""
CROWD = "; where there are more workers than cores, they also wait for each other's computing"
EXCHANGE = """The gradients of well-known models, with a backward that only copies them, which takes the time of "no
exchange". Parameters: {sizes}."""
GAINS = """How many times faster rank 4 is than others, after "no exchange" is taken from all of them ({framework},
2 hosts, {rate}):"""
KERNELS = """What compression and decompression take by themselves, with one thread, in plain copies of the same
gradient: each of the three passes over it, and all of them together."""
TRAINING = """Forward and backward are real: {tasks}. All methods see the same batches and the same learning rates.
Times of a step's parts are in milliseconds. Backward includes what is exchanged meanwhile, for DDP all of it; "wait" is
for what is still on its way then."""
PARTS = """Of these, the parts of this package's exchange in a step, in milliseconds, by its marks in PyTorch's
profiler: "p" adds the memory and makes P, "q" makes Q, and "wait" is where the training stands still for the
network."""


def prose(text, **found):
    paragraphs = text.format(**found).split("\n\n")
    return "".join(f"\n{textwrap.fill(' '.join(paragraph.split()), 120)}\n" for paragraph in paragraphs)


def time_cell(row):
    if "median_ms" not in row:
        return row.get("left_out") or row["error"]
    low, high = row["quartiles_ms"]
    return f"{row['median_ms']:,.0f}" + (f" ({low:,.0f}-{high:,.0f})" if row["steps"] > 1 else "")


def bytes_cell(row):
    if "wire_bytes" not in row:
        return ""
    sent = f"{row['wire_bytes'] / 1e6:,.2f}"
    told = "bytes_sent" in row and METHODS[row["method"]].library == "ours"
    return f"{sent} ({row['bytes_sent'] / 1e6:,.2f})" if told else sent


def markdown(head, body):
    """A table; columns after the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def pivot(rows, columns, column_of, cell):
    """A line for each method, and a column for each of {what column_of gives: its title} that is there."""
    places = {(row["method"], column_of(row)): row for row in rows}
    columns = {key: title for key, title in columns.items() if any(place[1] == key for place in places)}
    return markdown(
        ["", *columns.values()],
        [
            [method.title, *(cell(places[key, column]) if (key, column) in places else "" for column in columns)]
            for key, method in METHODS.items()
            if any(place[0] == key for place in places)
        ],
    )


def both(rows, columns, column_of):
    """Times, and what was sent."""
    times, sent = pivot(rows, columns, column_of, time_cell), pivot(rows, columns, column_of, bytes_cell)
    return f"\nMilliseconds:\n\n{times}\nMB that a worker sends:\n\n{sent}"


def gains_table(rows):
    """How many times less than others the exchange takes at rank 4, without the time of "no exchange"."""
    times = {(row["model"], row["method"]): row["median_ms"] for row in rows if "median_ms" in row}
    others = [method for method in GAINS_OVER if any(key == method for _, key in times)]
    body = []
    for model in models_in(rows):
        nothing, ours = times.get((model, "no-exchange")), times.get((model, "rank-4"))
        if nothing is not None and ours is not None:
            net = [times[model, key] - nothing if (model, key) in times else None for key in others]
            gains = ["" if other is None else f"{other / (ours - nothing):.1f}x" for other in net]
            body.append([TITLES[model], f"{ours - nothing:,.0f}", *gains])
    return markdown(["", "rank 4, ms", *(METHODS[key].title for key in others)], body)


def kernels_table(rows):
    body = []
    for row in rows:
        passes = [f"{copies:.1f}" for copies in row["passes_in_copies"].values()]
        step = f"{row['step_in_copies']:.1f} ({row['quartiles'][0]:.1f}-{row['quartiles'][1]:.1f})"
        matrix = f"{row['matrix']}, {' x '.join(map(str, row['shape']))}"
        body.append([matrix, row["rank"], f"{row['copy_ms']:.2f}", *passes, step])
    return markdown(["", "rank", "copy, ms", *rows[0]["passes_in_copies"], "step"], body)


def exchange_tables(rows):
    for framework, name in FRAMEWORKS.items():
        for rate, speed in RATES.items():
            found = [r for r in rows if (r["framework"], r["rate"], r["hosts"]) == (framework, rate, 2)]
            if found:
                yield f"\n### {name}, 2 hosts, {speed}\n" + both(found, TITLES, lambda row: row["model"])
    for framework, name in FRAMEWORKS.items():
        for rate, speed in RATES.items():
            for model in MODELS:
                found = [r for r in rows if (r["framework"], r["rate"], r["model"]) == (framework, rate, model)]
                if {row["hosts"] for row in found} - {2}:
                    many = {hosts: f"{hosts} hosts" for hosts in sorted({row["hosts"] for row in found})}
                    shared = {row["method"] for row in found if row["hosts"] > 2}
                    found = [row for row in found if row["method"] in shared]
                    title = f"\n### {name}, {TITLES[model]}, {speed}, more hosts\n"
                    yield title + both(found, many, lambda row: row["hosts"])


def training_table(rows):
    """Times to the target, and how many times shorter than plain Horovod's they are."""
    reached = [row for row in rows if row.get("reached")]
    plain = {(row["task"], row["rate"], row["hosts"]): row["seconds"] for row in reached if row["method"] == "hvd"}
    body = []
    for row in rows:
        place = row["task"], row["rate"], row["hosts"]
        line = [TASKS[row["task"]].title, f"{row['hosts']} hosts, {RATES[row['rate']]}", METHODS[row["method"]].title]
        if "error" in row:
            body.append([*line, row["error"], *[""] * 8])
            continue
        ratio = f"{plain[place] / row['seconds']:.2f}x" if row in reached and place in plain else ""
        seconds = f"{row['seconds']:.1f} s" if row["reached"] else f"not in {row['seconds']:.1f} s"
        phases = [f"{ms:.0f}" for ms in row["phases_ms"].values()]
        body.append([*line, seconds, ratio, row["steps"], f"{row['step_ms']:.0f}", *phases, bytes_cell(row)])
    head = ["", "", "", "to target", "faster", "steps", "step, ms", "forward", "backward", "wait", "update", "MB sent"]
    return markdown(head, body)


def parts_table(rows):
    """The parts of this package's exchange, which lie in backward and in wait."""
    rows = [row for row in rows if row.get("exchange_ms")]
    names = list(dict.fromkeys(name for row in rows for name in row["exchange_ms"]))
    body = []
    for row in rows:
        place = f"{TASKS[row['task']].title}, {METHODS[row['method']].title}"
        body.append([place, *(f"{row['exchange_ms'].get(name, 0):.1f}" for name in names)])
    return markdown(["", *names], body)


def panels_for(things, width, height, **options):
    """A figure, and a panel for each of the things."""
    size = width * len(things) + 1, height
    options |= dict(squeeze=False, dpi=110, layout="constrained")
    figure, panels = pyplot.subplots(1, len(things), figsize=size, **options)
    for panel in panels[0]:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(panels[0], things))


def save(figure, name):
    figure.canvas.draw()
    # 32 colours are enough, and make a small file.
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(32)
    image.save(DOCS / f"{name}.png", optimize=True)
    pyplot.close(figure)
    return f"\n![]({name}.png)\n"


def exchange_figure(rows, rate):
    """A panel per model, with a bar per method."""
    methods = [key for key in COLORS if any(row["method"] == key for row in rows)]
    figure, panels = panels_for(models_in(rows), width=2.2, height=2.3, sharey=True)
    for panel, model in panels:
        times = {row["method"]: row.get("median_ms", 0) for row in rows if row["model"] == model}
        for key in methods:
            panel.barh(METHODS[key].title, times.get(key, 0), color=COLORS[key])
        panel.set(title=TITLES[model], xlabel="ms")
        panel.xaxis.set_major_formatter("{x:,.0f}")
    panels[0][0].invert_yaxis()
    figure.suptitle(f"One exchange: PyTorch, 2 hosts, {RATES[rate]}")
    return save(figure, "exchange")


def links_figure(rows):
    """A panel per model: time against the links' rate."""
    rates = [rate for rate in RATES if any(row["rate"] == rate for row in rows)]
    figure, panels = panels_for(models_in(rows), width=2.2, height=3, sharey=True)
    for panel, model in panels:
        for key in ("hvd", "hvd-fp16", "rank-4"):
            times = {r["rate"]: r.get("median_ms") for r in rows if (r["model"], r["method"]) == (model, key)}
            points = [times.get(rate) for rate in rates]
            points = [np.nan if point is None else point for point in points]
            panel.plot(range(len(rates)), points, color=COLORS[key], marker="o", markersize=3, label=METHODS[key].title)
        panel.set(title=TITLES[model], yscale="log", xlim=(-0.2, len(rates) - 0.8))
        panel.set_xticks(range(len(rates)), [RATES[rate] for rate in rates], rotation=90)
        panel.yaxis.set_major_formatter("{x:,.0f}")
    first = panels[0][0]
    first.set_ylabel("ms per exchange")
    figure.legend(*first.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    return save(figure, "links")


def training_figure(rows):
    """A panel per task: validation loss against the time spent in training."""
    places = list(dict.fromkeys((row["task"], row["rate"], row["hosts"]) for row in rows))
    figure, panels = panels_for(places, width=4, height=3.2)
    for panel, place in panels:
        for row in rows:
            if (row["task"], row["rate"], row["hosts"]) == place and "curve" in row and row["method"] in COLORS:
                _, seconds, losses = zip(*row["curve"])
                panel.plot(seconds, losses, color=COLORS[row["method"]], label=METHODS[row["method"]].title)
        task, rate, hosts = place
        panel.axhline(TASKS[task].target, color="black", linewidth=0.8, linestyle=":")
        panel.set(xlabel="seconds", xlim=(0, None), ylabel="validation loss")
        panel.set_title(f"{TASKS[task].title}, {hosts} hosts, {RATES[rate]}")
        panel.legend(frameon=False, fontsize=8)
    return save(figure, "training")


def models_in(rows):
    return [model for model in MODELS if any(row["model"] == model for row in rows)]


def read(name):
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"rows": []}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    exchange, training, kernels = read("exchange"), read("train"), read("kernels")["rows"]
    measured = next((part for part in (exchange, training) if part["rows"]), None)
    if measured is None:
        raise SystemExit("There are no results: run benchmarks/exchange.py or benchmarks/train.py first")
    rows = exchange["rows"] + training["rows"]
    obstacle, cores = measured["obstacle"], measured["cores"]
    page = ["# Benchmarks\n\n`make bench` measures all of this again, and writes this page.\n"]
    page += prose(
        INTRODUCTION,
        place=CLUSTER if obstacle is None else LOOPBACK.format(obstacle=obstacle),
        cores=cores,
        crowd=CROWD if max(row["hosts"] for row in rows) > cores else "",
        launchers=" and ".join(sorted({row["launcher"] for row in rows})),
    )
    if exchange["rows"]:
        models = models_in(exchange["rows"])
        sizes = ", ".join(f"{TITLES[model]} {parameters(model) / 1e6:.1f} M" for model in models)
        page += ["\n## One exchange\n", prose(EXCHANGE, sizes=sizes)]
        two = [row for row in exchange["rows"] if row["framework"] == "torch" and row["hosts"] == 2]
        rate = "1gbit" if obstacle is None else "loopback"
        shown = [row for row in two if row["rate"] == rate]
        if shown:
            page.append(exchange_figure(shown, rate))
        for framework, name in FRAMEWORKS.items():
            there = [r for r in exchange["rows"] if (r["framework"], r["hosts"], r["rate"]) == (framework, 2, rate)]
            if {"no-exchange", "rank-4"} <= {row["method"] for row in there}:
                page += [prose(GAINS, framework=name, rate=RATES[rate]), "\n", gains_table(there)]
        if len({row["rate"] for row in two}) > 1:
            page.append(links_figure(two))
        page += exchange_tables(exchange["rows"])
    if kernels:
        page += ["\n## Kernels\n", prose(KERNELS), "\n", kernels_table(kernels)]
    if training["rows"]:
        tasks = {row["task"] for row in training["rows"]}
        told = "; ".join(TASKS[task].description for task in TASKS if task in tasks)
        page += ["\n## Training\n", prose(TRAINING, tasks=told), training_figure(training["rows"])]
        page.append("\n" + training_table(training["rows"]))
        page += [prose(PARTS), "\n", parts_table(training["rows"])]
    (DOCS / "benchmarks.md").write_text("".join(page))
    print(f"{DOCS / 'benchmarks.md'} and its figures are written")


if __name__ == "__main__":
    main()
