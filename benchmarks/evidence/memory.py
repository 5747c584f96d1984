"""Measures quality where the error-feedback memory has 16 bits a number.

    python benchmarks/evidence/memory.py --seeds 1      # in about two minutes on 2 cores
    python benchmarks/evidence/memory.py                # three seeds
"""

from runs import measure, parse

METHODS = ["rank-4", "rank-4-memory-bfloat16", "rank-4-memory-float16"]

if __name__ == "__main__":
    measure("memory", parse(__doc__), METHODS, "10gbit")
