"""Predicts one exchange on clusters that are larger than what there is here: horovod_powersgd.cost, on paper.

    python benchmarks/scale.py

Assumed: workers in a ring, or in a tree, each host with one link, whose rate it has in both directions all the time;
20 microseconds from a worker to the next, and a millisecond for a message at least, which is Horovod's cycle; passes
as horovod_powersgd.plan.TYPICAL_WORK has them, of one core; nothing of an exchange is hidden behind backward; nobody
waits for a slower one. Hosts have 8 workers, each of which reads 3 GB/s of the others' gradients
(network.READ_IN_HOST).
"""

import math

from horovod_powersgd import PowerSGD
from horovod_powersgd.cost import predict, predict_plain
from horovod_powersgd.network import Curve, Network
from horovod_powersgd.plan import TYPICAL_WORK
from models import MODELS, TITLES

LATENCY, PER_HOST = 20e-6, 8
RATES = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 10e9 / 8, "25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8}
WORKERS = [16, 64, 256, 1024, 4096]
RANK_8 = "hvd.PowerSGD(rank=8)"


def ring(workers, bytes_per_second):
    """Neighbours share a host, so that each part of a message comes over a host's link once."""
    return Network.of_links(workers, bytes_per_second, LATENCY, PER_HOST)


def tree(workers, bytes_per_second):
    """Messages that go up a tree and down again, cut in pieces so that all links work at once."""
    depth = math.ceil(math.log2(workers))

    def line(rounds, factor):
        return Curve.of_line(rounds * LATENCY, factor / bytes_per_second)

    mean = line(2 * depth, 2)
    # Inside hosts, and where each sends each of the others its part, which no tree spares it, all is as in a ring.
    return ring(workers, bytes_per_second)._replace(allreduce=mean, halves=mean, allgather=line(depth, workers - 1))


def options(shapes, network):
    """Seconds of an exchange, by what is done."""
    work = TYPICAL_WORK[RANK_8]
    return {
        "plain": predict_plain(shapes, network).seconds,
        "fp16": predict_plain(shapes, network, TYPICAL_WORK["hvd.Compression.fp16"]).seconds,
        "rank 8": predict(shapes, PowerSGD(8), network, work).seconds,
        "rank 8, two levels": predict(shapes, PowerSGD(8, hierarchical=True), network, work).seconds,
    }


def main():
    for model in ("resnet50", "gpt2-small"):
        shapes = [shape for _, shape in MODELS[model]()]
        for network_of in (ring, tree):
            print(f"\n{TITLES[model]}, {network_of.__name__}: milliseconds of an exchange; the shortest is marked\n")
            print("| links of a host | workers | plain | fp16 | rank 8 | rank 8, two levels |")
            print("| --- | ---: | ---: | ---: | ---: | ---: |")
            for name, rate in RATES.items():
                for workers in WORKERS:
                    found = options(shapes, network_of(workers, rate))
                    least = min(found.values())
                    cells = [f"**{1e3 * t:,.0f}**" if t == least else f"{1e3 * t:,.0f}" for t in found.values()]
                    print(f"| {name} | {workers:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
