"""Changes the links' rate in the middle of a job with Auto, and prints what its steps take and what is chosen.

    python benchmarks/evidence/relinked.py     # in about three minutes

Two hosts exchange the gradients of a model of region.py's, of 8 square matrices of a width. After each half minute the
links get the next rate.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import cluster  # noqa: E402
from job import results  # noqa: E402

RATES = ["10gbit", "100mbit", "10gbit"]
SECONDS = 30  # at each rate; the job's start is in the first
FEW = 20  # steps


def work(args):
    """What worker 0 leaves: (when, ms, candidate) of each step."""
    import torch

    import horovod_powersgd.torch as hvd
    from exchange_torch import Exchange
    from region_worker import tensors

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    exchange, steps = Exchange("auto", tensors(args.width), [torch.randn(s) for _, s in tensors(args.width)]), []
    for number in itertools.count():
        if number % FEW == 0 and hvd.broadcast_object(time.time() > args.until, name="over"):
            break
        begin = time.perf_counter()
        exchange.step()
        taken = 1e3 * (time.perf_counter() - begin)
        chosen = exchange.stats().tensors[0].chosen
        steps.append((time.time(), taken, chosen.split("(")[0]))
    if hvd.rank() == 0:
        args.results.write_text(json.dumps(steps))


def relink(rates):
    """When the links got each of these rates, of which they have the first already."""
    begins = [time.time()]
    for rate in rates[1:]:
        time.sleep(SECONDS)
        cluster.up(2, rate)
        begins.append(time.time())
    return begins


def tell(rate, begin, steps):
    """Prints what became of the steps since the links have a rate."""
    chosen = [what for _, _, what in steps]
    first, last = (statistics.median(ms for _, ms, _ in some) for some in (steps[:FEW], steps[len(steps) // 2 :]))
    settled = next(i for i in range(len(steps)) if len(set(chosen[i:])) == 1)
    print(
        f"{rate:>8}: {first:8.1f} ms with {chosen[0]}, then {last:8.1f} ms with {chosen[-1]}, which it is after "
        f"{settled} steps, {steps[settled][0] - begin:.1f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--rates", nargs="+", choices=cluster.RATES, default=RATES)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)  # these are a worker's
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.results:
        return work(args)
    if cluster.tell_missing() is not None:
        return 1
    try:
        for width in args.widths:
            print(f"\n8 matrices of {width} x {width}", flush=True)
            cluster.up(2, args.rates[0])
            until = time.time() + SECONDS * len(args.rates)
            program = [__file__, "--width", width, "--until", until]
            with ThreadPoolExecutor(1) as pool:
                relinking = pool.submit(relink, args.rates)
                steps = results(program, 2, "mpirun", 60 + SECONDS * len(args.rates))
            begins = relinking.result()
            for rate, begin, end in zip(args.rates, begins, [*begins[1:], until]):
                # The first step that is all at this rate.
                tell(rate, begin, [step for step in steps if begin + step[1] / 1e3 < step[0] < end])
    finally:
        cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
