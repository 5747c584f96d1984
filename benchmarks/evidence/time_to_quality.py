"""Measures whole trainings: the time until a quality is reached, by the links' rate.

    python benchmarks/evidence/time_to_quality.py --seeds 1      # in about 9 minutes on 2 cores
    python benchmarks/evidence/time_to_quality.py                # three seeds; one where links let 100 Mbit/s through

Every method sees the same batches, which 4 workers share. The time is that of all steps from the first one on, without
the evaluations in between. A training that does not reach the quality goes on to its end.
"""

from compressions import METHODS as TITLED
from runs import LEARNERS, Hosts, calm, parse, plan, spread

METHODS = ["none", "fp16", "rank-2", "rank-4", "auto"]
RATES = ["100mbit", "1gbit", "10gbit"]
TARGETS = {"cnn": 91.0, "lstm": 85.0}


def reached(row):
    return row["quality"] >= row["target"] if row["learner"] == "cnn" else row["quality"] <= row["target"]


def times(rows):
    """The seconds to the target, by seed."""
    return {row["seed"]: row["seconds"] for row in rows if reached(row)}


def cells(rows, learner, links, method):
    """(the time to the target, how many times sooner than plain Horovod that is, in the seeds that both have).

    Times that others disturbed count only if there are no others, and are in brackets then.
    """
    group, plain = (
        [row for row in rows if (row["learner"], row["links"], row["method"]) == (learner, links, key)]
        for key in (method, "none")
    )
    found = times(group)
    if len(found) < len(group):
        return f"{len(group) - len(found)} of {len(group)} never", ""
    if not group:
        return "", ""
    undisturbed = bool(calm(group))
    time = f"{spread(list(times(calm(group) or group).values()))} s"
    both = [seed for seed in times(calm(group) or group) if seed in times(calm(plain) or plain)]
    gain = f"{sum(times(plain)[s] for s in both) / sum(found[s] for s in both):.2f}x" if both else ""
    certain = undisturbed and calm(plain)
    return time if undisturbed else f"({time})", gain if certain or not gain else f"({gain})"


def main():
    args = parse(__doc__)
    rows = []
    with Hosts() as hosts:
        for rate in RATES if hosts.obstacle is None else ["loopback"]:
            print(f"\n{rate}", flush=True)
            runs = [run | {"target": TARGETS[run["learner"]]} for run in plan(args, METHODS)]
            rows += hosts.train([run for run in runs if run["seed"] == 0 or rate != "100mbit"], args, rate)
            hosts.keep("time_to_quality", rows)
    for learner in args.learners:
        print(f"\n{LEARNERS[learner]}, to {TARGETS[learner]}")
        for method in METHODS:
            found = [" ".join(cells(rows, learner, links, method)) for links in dict.fromkeys(r["links"] for r in rows)]
            print(f"{TITLED[method].title:<42}" + "".join(f"{cell:>26}" for cell in found))


if __name__ == "__main__":
    main()
