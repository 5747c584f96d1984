"""Measures quality against bytes where factors, or whole gradients, travel in fewer bits: in short trainings, and in
some that are four times as long.

    python benchmarks/evidence/bits.py --seeds 1      # in about 25 minutes on 2 cores
    python benchmarks/evidence/bits.py                # three seeds

4 workers, whose links let 10 Gbit/s through: it is for the quality only.
"""

from longer import TIMES
from runs import RESULTS, Hosts, parse, plan, print_table

RANKS = (2, 4, 8, 16)
# As methods' names end, by how factors travel.
PRECISIONS = {"full precision": "", "half precision": "-float16", "8 bits": "-int8"}
METHODS = ["none", *(f"rank-{rank}{end}" for rank in RANKS for end in PRECISIONS.values()), "int8"]


def runs(args):
    """Short and longer ones, seed by seed."""
    both = [run | {"times": times} for times in (1, TIMES) for run in plan(args, METHODS)]
    return sorted(both, key=lambda run: run["seed"])


if __name__ == "__main__":
    args = parse(__doc__)
    with Hosts() as hosts:
        rows = hosts.train(runs(args), args, "10gbit")
        minutes = hosts.keep("bits", rows)
    for times in (1, TIMES):
        print_table([row for row in rows if row["times"] == times])
    print(f"\nalso in {RESULTS / 'bits'}.json, after {minutes} minutes")
