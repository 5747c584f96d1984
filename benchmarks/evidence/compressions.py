"""The ways of compressing gradients that are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

import horovod_powersgd as powersgd


@dataclass(frozen=True)
class Method:
    """A way of compressing gradients.

    Attributes:
        title: in tables and figures.
        compression: makes what DistributedOptimizer takes, from a Model; a string is one of Horovod's own.
        rate: what the recipe's learning rate is multiplied by, for matrices.
        signs: it delivers signs with a momentum of their own, so that SGD's momentum and the clipping are left out;
            vectors are learned as ever.
    """

    title: str
    compression: Callable | str
    rate: float = 1.0
    signs: bool = False


@dataclass(frozen=True)
class Model:
    """What a compression can depend on.

    Attributes:
        shapes: of all parameters.
        interval: the steps after which Accordion decides again.
    """

    shapes: list
    interval: int

    def part(self, rank):
        """What PowerSGD of this rank sends of the model's matrices, as a part of their bytes."""
        matrices = [shape for shape in self.shapes if len(shape) > 1]
        return powersgd.PowerSGD(rank=rank).traffic(matrices, workers=2).sent / sum(4 * prod(m) for m in matrices)


def rank(r, **options):
    return lambda model: powersgd.PowerSGD(rank=r, **options)


def keep(name, rank, bytes_each=1):
    """A sparsifier that sends as many bytes as PowerSGD of a rank.

    Args:
        name: of its class.
        bytes_each: of an entry that is kept, in those of a number; an entry whose place travels with it takes 2.
    """
    return lambda model: getattr(powersgd, name)(ratio=model.part(rank) / bytes_each)


def top(ratio):
    return lambda model: powersgd.TopK(ratio=ratio)


def accordion(low, high):
    return lambda model: powersgd.Accordion(low(model), high(model), interval=model.interval)


def subspace(memory):
    """PowerSGD of rank 2 as a user would write it, with either rule for the memory.

    Args:
        memory: "local", what is left of a worker's delta by its own Q_w; "averaged", by the averaged Q.
    """

    def exchange(delta, state):
        if powersgd.PowerSGD(rank=2).obstacle(*state.shape):
            mean = yield powersgd.AllreduceMean(delta)
            return mean, delta
        random = np.random.default_rng([state.key, 0]).standard_normal((state.shape[1], 2))
        p = yield powersgd.AllreduceMean(delta @ state.arrays.like(state.get("q", random), delta))
        basis = state.arrays.svd(p)[0]
        own = delta.T @ basis
        q = yield powersgd.AllreduceMean(own)
        state.put("q", q)
        return basis @ q.T, basis @ (own if memory == "local" else q).T

    return exchange


METHODS = {
    "none": Method("none (Horovod)", "none"),
    "fp16": Method("fp16 (Horovod)", "fp16"),
    "rank-1": Method("PowerSGD, rank 1", rank(1)),
    "rank-2": Method("PowerSGD, rank 2", rank(2)),
    "rank-4": Method("PowerSGD, rank 4", rank(4)),
    "rank-8": Method("PowerSGD, rank 8", rank(8)),
    "rank-16": Method("PowerSGD, rank 16", rank(16)),
    # Of a rank, in fewer bits.
    **{
        f"rank-{r}-{dtype}": Method(f"PowerSGD, rank {r}, {dtype}", rank(r, wire_dtype=dtype))
        for r in (2, 4, 8, 16, 32)
        for dtype in ("float16", "int8")
    },
    "rank-16-int8-warmup": Method(
        "PowerSGD, rank 16, int8, after a tenth of the steps without compression",
        lambda model: powersgd.PowerSGD(rank=16, wire_dtype="int8", warmup_steps=model.interval),
    ),
    **{
        f"rank-4-memory-{dtype}": Method(f"PowerSGD, rank 4, memory in {dtype}", rank(4, memory_dtype=dtype))
        for dtype in ("bfloat16", "float16")
    },
    "int8": Method("Int8", lambda model: powersgd.Int8()),
    "auto": Method("Auto", lambda model: powersgd.Auto()),
    # Medium compression: what rank 7 sends. High: what rank 2 sends.
    "rank-7": Method("PowerSGD, rank 7", rank(7)),
    "random-block-7": Method("random block, as rank 7", keep("RandomBlock", 7)),
    "random-k-7": Method("random K, as rank 7", keep("RandomK", 7)),
    "top-k-7": Method("top K, as rank 7", keep("TopK", 7, bytes_each=2)),
    "random-block-2": Method("random block, as rank 2", keep("RandomBlock", 2)),
    "random-k-2": Method("random K, as rank 2", keep("RandomK", 2)),
    "top-k-2": Method("top K, as rank 2", keep("TopK", 2, bytes_each=2)),
    "sign-norm": Method("sign and norm", lambda model: powersgd.SignNorm()),
    "gradiveq": Method(
        "GradiVeQ, 8 of 256 dimensions",
        lambda model: powersgd.GradiVeq(slice_size=256, dimensions=8, learning_steps=5, compressed_steps=95),
    ),
    "signum": Method("Signum, learning rate / 2000", lambda model: powersgd.Signum(), rate=1 / 2000, signs=True),
    "signum-tuned": Method("Signum, learning rate tuned", lambda model: powersgd.Signum(), rate=1 / 50, signs=True),
    "atomo": Method("Atomo, rank 2", lambda model: powersgd.Atomo(rank=2)),
    # Accordion's two levels, and itself.
    "top-k-99%": Method("top K, 99%", top(0.99)),
    "top-k-10%": Method("top K, 10%", top(0.1)),
    "accordion-2-1": Method("Accordion, rank 2 or 1", accordion(rank(2), rank(1))),
    "accordion-4-1": Method("Accordion, rank 4 or 1", accordion(rank(4), rank(1))),
    "accordion-top-k": Method("Accordion, top K 99% or 10%", accordion(top(0.99), top(0.1))),
    # Ablations of rank 2.
    "no-memory": Method("without error feedback", rank(2, error_feedback=False)),
    "unbiased": Method("unbiased, rank 2, without error feedback", lambda model: powersgd.UnbiasedRank(rank=2)),
    "cold": Method("without warm start", rank(2, warm_start=False)),
    "cold-4": Method("without warm start, 4 half-steps", rank(2, warm_start=False, num_iters_per_step=4)),
    "refresh": Method("a fresh start every 20 steps", rank(2, refresh_every=20)),
    "half-steps-1": Method("1 half-step", rank(2, num_iters_per_step=1)),
    "half-steps-4": Method("4 half-steps", rank(2, num_iters_per_step=4)),
    "half-steps-8": Method("8 half-steps", rank(2, num_iters_per_step=8)),
    "best": Method("the best matrix of rank 2", lambda model: powersgd.BestRank(rank=2)),
    "local-memory": Method("memory from the own Q", lambda model: subspace("local")),
    "averaged-memory": Method("memory from the averaged Q", lambda model: subspace("averaged")),
}
