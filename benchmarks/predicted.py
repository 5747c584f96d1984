"""Compares what horovod_powersgd.cost predicted with what exchange.py measured in the same launches.

    python benchmarks/exchange.py --models resnet18 lstm --methods no-exchange hvd rank-4 --rates 1gbit 10gbit
    python benchmarks/predicted.py                # prints a table, and draws docs/predicted.png
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

from exchange import RESULTS
from methods import METHODS
from models import TITLES
from report import DOCS, RATES

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

MARKERS = {"100mbit": "s", "1gbit": "o", "10gbit": "^", "unshaped": "x", "loopback": "x"}


def off(row):
    """How far the prediction is from the measurement, as a part of that."""
    return row["predicted_ms"] / row["median_ms"] - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=[RESULTS])
    args = parser.parse_args()
    rows = [row for path in args.results for row in json.loads(path.read_text())["rows"] if "predicted_ms" in row]
    places = dict.fromkeys((row["hosts"], row["rate"], row["model"]) for row in rows)
    methods = dict.fromkeys(row["method"] for row in rows)
    found = {(row["hosts"], row["rate"], row["model"], row["method"]): row for row in rows}
    print("| | " + " | ".join(METHODS[method].title for method in methods) + " |")
    print("| --- |" + " ---: |" * len(methods))
    for hosts, rate, model in places:
        cells = [found.get((hosts, rate, model, method)) for method in methods]
        shown = [f"{r['median_ms']:,.0f} ({r['predicted_ms']:,.0f})" if r else "" for r in cells]
        print(f"| {hosts} hosts, {RATES[rate]}, {TITLES[model]} | " + " | ".join(shown) + " |")
    errors = sorted(rows, key=lambda row: abs(off(row)))
    worst = errors[-1]
    print(
        f"\n{sum(abs(off(row)) <= 0.2 for row in rows)} of {len(rows)} within 20%, the median off by "
        f"{statistics.median(abs(off(row)) for row in rows):.0%}; the worst is {METHODS[worst['method']].title}, "
        f"{TITLES[worst['model']]}, {worst['hosts']} hosts, {RATES[worst['rate']]}: off by {off(worst):+.0%}"
    )
    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    for rate in dict.fromkeys(row["rate"] for row in rows):
        some = [row for row in rows if row["rate"] == rate]
        measured, predicted = ([row[key] for row in some] for key in ("median_ms", "predicted_ms"))
        axes.loglog(measured, predicted, MARKERS[rate], label=RATES[rate], mfc="none")
    ends = [min(row["median_ms"] for row in rows) / 1.5, max(row["median_ms"] for row in rows) * 1.5]
    axes.loglog(ends, ends, color="#999999", lw=1)
    axes.fill_between(ends, [0.8 * end for end in ends], [1.2 * end for end in ends], color="#999999", alpha=0.2)
    axes.set_xlabel("measured, milliseconds of a step")
    axes.set_ylabel("predicted")
    axes.legend()
    figure.savefig(DOCS / "predicted.png", dpi=100)


if __name__ == "__main__":
    main()
