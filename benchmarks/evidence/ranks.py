"""Measures Table 3 of the PowerSGD paper: quality, bytes per epoch and time per batch for ranks 1, 2 and 4.

    python benchmarks/evidence/ranks.py --seeds 1      # in about 3 minutes on 2 cores
    python benchmarks/evidence/ranks.py                # three seeds

4 workers, whose links let 1 Gbit/s through.
"""

from runs import measure, parse

METHODS = ["none", "rank-1", "rank-2", "rank-4"]

if __name__ == "__main__":
    measure("ranks", parse(__doc__), METHODS)
