"""Times several methods in turn, in rounds, so that what disturbs the machine for a while disturbs all of them."""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from horovod_powersgd.launcher import prepare_worker
from methods import METHODS
from models import MODELS

UNDER_MPIRUN = "OMPI_COMM_WORLD_SIZE" in os.environ
if UNDER_MPIRUN:
    # Horovod is shut down and started again between methods. It leaves MPI alone if it has not started it; what our
    # hvd.init() does before it starts MPI is then to be done here.
    prepare_worker()
    from mpi4py import MPI  # noqa: F401

SECONDS = 2.0  # that a method gets in a round
MOST_STEPS = 10  # of a method in a round
# Where steps are short, there are more rounds than are asked for: in so many seconds, and so many at most.
SHORT_SECONDS, MOST_ROUNDS = 5.0, 30


def run_worker(description, exchanges_of, hvd, predict=lambda model, exchanges: {}):
    """A worker of exchange.py.

    Args:
        description: of the program.
        exchanges_of: (model, methods) to what measure_rounds takes.
        hvd: Horovod for the framework.
        predict: (model, exchanges) to what is predicted of some methods: Predictions.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    hvd.init()
    exchanges = exchanges_of(args.model, args.methods)
    predictions = predict(args.model, exchanges)
    rows = measure_rounds(exchanges, args.rounds, hvd)
    backward = next((row["median_ms"] / 1e3 for row in rows if row["method"] == "no-exchange"), 0.0)
    for row in rows:
        if row["method"] in predictions:
            row["predicted_ms"] = round(1e3 * predictions[row["method"]].step(backward), 2)
    if hvd.rank() == 0:
        args.results.write_text(json.dumps(rows))


def measure_rounds(exchanges, rounds, hvd):
    """What each method's step takes.

    Args:
        exchanges: {method: an object with step(), pause() and bytes_sent()}.
        rounds: how many; more where steps are short.
        hvd: Horovod for the framework, which is running.

    Returns:
        A dictionary for each method: `median_ms` and `quartiles_ms` of a step, `steps` that were timed, `wire_bytes`
        that a worker sent in a step, on average, and `bytes_sent` of them that this worker handed to allreduce.
    """
    warm = {key: _warm_up(key, exchange, hvd) for key, exchange in exchanges.items()}
    _switch(hvd, on=True)
    warm = hvd.allgather_object(warm)
    slowest = {key: max(worker[key] for worker in warm) for key in exchanges}
    steps = {key: min(MOST_STEPS, max(1, round(SECONDS / slowest[key]))) for key in exchanges}
    in_a_round = sum(steps[key] * slowest[key] for key in exchanges)
    seconds, wire = {key: [] for key in exchanges}, dict.fromkeys(exchanges, 0)
    for _ in range(max(rounds, min(MOST_ROUNDS, round(SHORT_SECONDS / in_a_round)))):
        for key, exchange in exchanges.items():
            _switch(hvd, on=METHODS[key].uses_horovod)
            exchange.step()  # after a pause, it is slower
            before = wire_bytes()
            seconds[key] += [_seconds(exchange) for _ in range(steps[key])]
            wire[key] += wire_bytes() - before
            exchange.pause()
    _switch(hvd, on=True)
    seconds, wire = hvd.allgather_object(seconds), hvd.allgather_object(wire)
    return [
        _row(key, [worker[key] for worker in seconds], [worker[key] for worker in wire], exchange.bytes_sent())
        for key, exchange in exchanges.items()
    ]


def _switch(hvd, on):
    """Runs Horovod for the methods that use it only: its thread would take a third more time from the others.

    Under horovodrun it always runs: a worker that starts it again can find the addresses of the last time, and hang.
    """
    if not UNDER_MPIRUN:
        return
    if on and not hvd.is_initialized():
        hvd.init()
    if not on:
        hvd.shutdown()


def _warm_up(key, exchange, hvd):
    """The seconds of a step after the first ones."""
    _switch(hvd, on=METHODS[key].uses_horovod)
    for _ in range(METHODS[key].first_steps):
        last = _seconds(exchange)
    exchange.pause()
    return last


def _seconds(exchange):
    begin = time.perf_counter()
    exchange.step()
    return time.perf_counter() - begin


def wire_bytes():
    """What has left this worker's network interface."""
    return int(Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics/tx_bytes").read_text())


def of_each(wire):
    """What a worker has sent, on average, from the wire_bytes() of all of them."""
    # On the loopback interface, each worker sees what all of them send.
    senders = len(wire) if os.environ["GLOO_SOCKET_IFNAME"] == "lo" else 1
    return statistics.mean(wire) / senders


def step_ms(seconds):
    """Milliseconds of each step, from the seconds of all workers: their mean. Who is late in one step waits the less in
    the next: the slowest one's would add up to more than the job takes."""
    return [1000 * statistics.mean(step) for step in zip(*seconds)]


def _row(key, seconds, wire, bytes_sent):
    steps = step_ms(seconds)
    quartiles = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3
    return {
        "method": key,
        "median_ms": round(quartiles[1], 2),
        "quartiles_ms": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "steps": len(steps),
        "wire_bytes": round(of_each(wire) / len(steps)),
        "bytes_sent": bytes_sent,
    }
