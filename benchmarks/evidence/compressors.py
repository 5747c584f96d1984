"""Measures Table 4 of the PowerSGD paper: other compressors, with as many bytes as PowerSGD's rank 7 and rank 2.

    python benchmarks/evidence/compressors.py --seeds 1      # in about 5 minutes on 2 cores
    python benchmarks/evidence/compressors.py                # three seeds

4 workers, whose links let 1 Gbit/s through; learning rates as tuned for plain SGD, but for Signum, which has two rows.
"""

from runs import measure, parse

MEDIUM = ["rank-7", "random-block-7", "random-k-7", "sign-norm", "top-k-7", "gradiveq"]
HIGH = ["rank-2", "random-block-2", "random-k-2", "top-k-2"]
OTHERS = ["signum", "signum-tuned", "atomo"]
METHODS = {
    "cnn": ["none", *MEDIUM, *HIGH, *OTHERS],
    "lstm": ["rank-7", "random-k-7", "sign-norm", "top-k-7", "rank-2", "random-k-2", "top-k-2"],
}

if __name__ == "__main__":
    measure("compressors", parse(__doc__), METHODS)
