"""Predicts one exchange on clusters that are larger than what there is here: horovod_powersgd.cost, on paper.

    python benchmarks/scale.py

Assumed: workers in a ring, or in a tree, each host with one link, whose rate it has in both directions all the time;
20 microseconds from a host to the next; passes as horovod_powersgd.plan.TYPICAL_WORK has them, of one core; nothing of
an exchange is hidden behind backward; nobody waits for a slower one. In two levels, 8 workers of a host add up their
gradients at 20 GB/s and each makes an eighth of the passes.
"""

import math

from horovod_powersgd import PowerSGD
from horovod_powersgd.cost import Curve, Network, Work, predict, predict_plain
from horovod_powersgd.plan import TYPICAL_WORK
from models import MODELS, TITLES

LATENCY, PER_HOST, IN_HOST = 20e-6, 8, 20e9
RATES = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 10e9 / 8, "25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8}
WORKERS = [16, 64, 256, 1024, 4096]
RANK_8 = "hvd.PowerSGD(rank=8)"


def tree(workers, bytes_per_second):
    """Messages that go up a tree and down again, cut in pieces so that all links work at once."""
    depth = math.ceil(math.log2(workers))

    def line(rounds, factor):
        return Curve(((0, rounds * LATENCY), (1e9, rounds * LATENCY + factor * 1e9 / bytes_per_second)))

    return Network(workers, line(2 * depth, 2), line(2 * depth, 2), line(depth, workers - 1))


def options(shapes, workers, rate, network_of):
    """Seconds of an exchange, by what is done."""
    hosts = workers // PER_HOST
    # Neighbours share a host, so that each part of a message comes over a host's link once.
    flat = network_of(workers, rate)
    between = network_of(hosts, rate) if hosts > 1 else Network.of_links(1, rate, LATENCY)
    config, work = PowerSGD(8), TYPICAL_WORK[RANK_8]
    nbytes = 4 * sum(map(math.prod, shapes))
    inside = 2 * (PER_HOST - 1) / PER_HOST * nbytes / IN_HOST
    shared = Work(work.per_tensor, work.per_byte / PER_HOST, work.per_side)
    return {
        "plain": predict_plain(shapes, flat).seconds,
        "fp16": predict_plain(shapes, flat, TYPICAL_WORK["hvd.Compression.fp16"]).seconds,
        "rank 8": predict(shapes, config, flat, work).seconds,
        "rank 8, two levels": inside + predict(shapes, config, between, shared).seconds,
    }


def main():
    for model in ("resnet50", "gpt2-small"):
        shapes = [shape for _, shape in MODELS[model]()]
        for title, network_of in (("ring", lambda w, r: Network.of_links(w, r, LATENCY)), ("tree", tree)):
            print(f"\n{TITLES[model]}, {title}: milliseconds of an exchange; the shortest is marked\n")
            print("| links of a host | workers | plain | fp16 | rank 8 | rank 8, two levels |")
            print("| --- | ---: | ---: | ---: | ---: | ---: |")
            for name, rate in RATES.items():
                for workers in WORKERS:
                    found = options(shapes, workers, rate, network_of)
                    least = min(found.values())
                    cells = [f"**{1e3 * t:,.0f}**" if t == least else f"{1e3 * t:,.0f}" for t in found.values()]
                    print(f"| {name} | {workers:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
