"""Measures what PowerSGD's parts are good for: rank 2 without them, and beside what it comes close to.

    python benchmarks/evidence/ablations.py --seeds 1      # in about 5 minutes on 2 cores
    python benchmarks/evidence/ablations.py                # three seeds

Error feedback, the warm start, more half-steps against the best matrix of that rank, and the memory that is taken from
the averaged Q in place of a worker's own (docs/memory.md). 4 workers, whose links let 1 Gbit/s through.
"""

from runs import measure, parse

CORE = ["rank-2", "no-memory", "cold", "half-steps-1", "half-steps-4", "best", "refresh"]
METHODS = {
    "cnn": [*CORE, "unbiased", "cold-4", "half-steps-8", "local-memory", "averaged-memory"],
    "lstm": [*CORE, "cold-4"],
}

if __name__ == "__main__":
    measure("ablations", parse(__doc__), METHODS)
