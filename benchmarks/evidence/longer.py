"""Measures trainings that are four times as long: whether what compression loses comes back.

    python benchmarks/evidence/longer.py --seeds 1      # in about 8 minutes on 2 cores
    python benchmarks/evidence/longer.py                # three seeds

4 workers, whose links let 10 Gbit/s through: it is for the quality only.
"""

from runs import measure, parse

METHODS = {"cnn": ["none", "rank-1", "rank-2", "rank-4"], "lstm": ["none", "rank-4", "rank-7"]}
TIMES = 4

if __name__ == "__main__":
    measure("longer", parse(__doc__), METHODS, rate="10gbit", times=TIMES)
