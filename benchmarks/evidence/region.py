"""Measures where plain allreduce is faster: one exchange by the model's size, the links' rate and the workers.

    python benchmarks/evidence/region.py     # in about 15 minutes on 2 cores

A model here is 8 square matrices and as many vectors, whose backward is almost free: what a step takes is the exchange.
The times are the workers' means, medians over up to 300 steps, and over 3 where they are long.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import cluster  # noqa: E402
from job import JobFailed, results  # noqa: E402
from methods import METHODS as TITLED  # noqa: E402
from runs import CROWDED, HERE, Hosts  # noqa: E402

MATRICES = 8
WIDTHS = [32, 64, 128, 256, 512, 1024]
METHODS = ["hvd", "hvd-fp16", "rank-1", "rank-4", "auto", "hvd-again"]
ENOUGH = 0.95  # of another one's speed
RATES = ["100mbit", "1gbit", "10gbit", "unshaped"]
HOSTS = [2, 4]
TIMEOUT = 600  # seconds, of the measurements at one place


def gain(rows, hosts, rate, width, method, over="hvd"):
    """How many times less a method's exchange takes than another one's; None if one is not there."""
    times = {
        row["method"]: row["median_ms"]
        for row in rows
        if (row["hosts"], row["rate"], row["width"]) == (hosts, rate, width)
    }
    return times[over] / times[method] if {over, method} <= times.keys() else None


def print_enough(rows):
    """In how many cells Auto is as fast as others, and Horovod as itself."""
    cells = list(dict.fromkeys((row["hosts"], row["rate"], row["width"]) for row in rows))
    for method, others in (("auto", ["hvd", "hvd-fp16", "rank-4"]), ("auto", ["hvd"]), ("hvd-again", ["hvd"])):
        gains = [[gain(rows, *cell, method, over) for over in others] for cell in cells]
        enough = sum(None not in found and min(found) >= ENOUGH for found in gains)
        names = " or ".join(TITLED[other].title for other in others)
        print(f"{TITLED[method].title} has {ENOUGH} of the speed of {names} in {enough} of {len(cells)} cells")


def print_rows(rows):
    for row in rows:
        low, high = row["quartiles_ms"]
        place = f"{row['hosts']} hosts, {row['rate']:<10}{MATRICES * row['width'] ** 2:>10,} parameters  "
        print(
            f"{place}{TITLED[row['method']].title:<18}{row['median_ms']:>9.1f} ms ({low:.1f} to {high:.1f})"
            + ("   disturbed" if row["others"] >= CROWDED else ""),
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=HOSTS)
    parser.add_argument("--rates", nargs="+", choices=cluster.RATES, default=RATES)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    with Hosts() as place:
        for count in args.hosts:
            for rate in args.rates if place.obstacle is None else ["loopback"]:
                if place.obstacle is None:
                    cluster.up(count, rate)
                print(f"\n{count} hosts, {rate}", flush=True)
                program = [HERE / "region_worker.py", "--rounds", args.rounds, "--widths", *args.widths]
                try:
                    measured = results([*program, "--methods", *METHODS], count, "mpirun", TIMEOUT)
                except JobFailed:
                    continue
                measured = [{"hosts": count, "rate": rate, **row} for row in measured]
                print_rows(measured)
                rows += measured
                place.keep("region", rows)
    print("\nHow many times faster rank 4 is than plain Horovod; below 1, plain Horovod is faster.\n")
    print(f"{'parameters':<20}" + "".join(f"{MATRICES * width**2:>12,}" for width in args.widths))
    for count, rate in dict.fromkeys((row["hosts"], row["rate"]) for row in rows):
        gains = [gain(rows, count, rate, width, "rank-4") for width in args.widths]
        print(f"{count} hosts, {rate:<11}" + "".join(f"{g:>11.2f}x" if g else " " * 12 for g in gains))
    print()
    print_enough(rows)


if __name__ == "__main__":
    main()
