"""Shows how the learning rates were chosen: plain SGD, and Signum, whose steps are of another size, with several rates.

    python benchmarks/evidence/tuning.py     # in about 4 minutes on 2 cores

4 workers, links without a limit, a seed that the other measurements do not use.
"""

from runs import Hosts, parse

SEED = 100
USUAL = [1 / 4, 1 / 2, 1, 2, 4]
RATES = {("cnn", "none"): USUAL, ("lstm", "none"): USUAL, ("cnn", "signum"): [5, 10, 20, 40, 80]}

if __name__ == "__main__":
    args = parse(__doc__)
    runs = [
        {"learner": learner, "method": method, "seed": SEED, "rate": rate}
        for (learner, method), rates in RATES.items()
        if learner in args.learners and (args.methods is None or method in args.methods)
        for rate in rates
    ]
    with Hosts() as hosts:
        rows = hosts.train(runs, args, rate="unshaped")
        hosts.keep("tuning", rows)
    print("\nlearning rate, in multiples of the one that the method is listed with, and quality")
    for row in rows:
        print(f"{row['learner']:<6}{row['method']:<10}{row['rate']:>8}{row['quality']:>10.2f}")
