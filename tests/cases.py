"""The gradients and configurations that every framework is compared with the reference on."""

import functools
from unittest import mock

import numpy as np

from horovod_powersgd import (
    Accordion,
    Atomo,
    BestRank,
    Float16,
    GradiVeq,
    Int8,
    NoCompression,
    PowerSGD,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    TopK,
    UnbiasedRank,
    quantization,
    reference,
)
from horovod_powersgd.layout import leading_rows

SHAPES = {
    "conv": (16, 8, 3, 3),
    "linear": (48, 64),
    "tall": (200, 12),
    "wide": (12, 200),
    "square": (32, 32),
    "row": (1, 40),
    "vector": (37,),
    "scalar": (),
}

# At least one for every field of PowerSGD.
CONFIGS = [
    PowerSGD(),
    PowerSGD(rank=1),
    PowerSGD(rank=3, min_compression_rate=0),
    PowerSGD(min_compression_rate=3.5, memory_dtype="float16"),
    PowerSGD(num_iters_per_step=1),
    PowerSGD(num_iters_per_step=3),
    PowerSGD(num_iters_per_step=1, warm_start=False),
    PowerSGD(warmup_steps=3),
    PowerSGD(warm_start=False),
    PowerSGD(error_feedback=False),
    PowerSGD(wire_dtype="float16"),
    PowerSGD(seed=7, memory_dtype="bfloat16"),
    PowerSGD(wire_dtype="int8"),
]

DTYPES = ["float32", "float64"]

# The compressors beside PowerSGD, and what is new in PowerSGD's course.
COMPRESSORS = [
    RandomK(0.1),
    RandomK(0.1, error_feedback=False),
    RandomBlock(0.1),
    TopK(0.05),
    SignNorm(),
    Signum(0.8),
    BestRank(2),
    UnbiasedRank(2),
    Atomo(2),
    GradiVeq(slice_size=32, dimensions=4, learning_steps=2, compressed_steps=3),
    NoCompression(),
    Float16(),
    Float16(error_feedback=False),
    Int8(block=100),
    PowerSGD(rank=2, refresh_every=3),
    PowerSGD(rank=2, num_iters_per_step=1, refresh_every=3),
]
# With the learning rates below, each layer is in both regimes, and goes from each to the other.
ACCORDIONS = [
    Accordion(PowerSGD(rank=4, wire_dtype="int8"), PowerSGD(rank=1, wire_dtype="int8"), interval=2),
    Accordion(PowerSGD(rank=3, num_iters_per_step=1), PowerSGD(rank=1, num_iters_per_step=1), interval=2),
    Accordion(TopK(0.1), TopK(0.01), interval=2),
    Accordion(RandomK(0.2), RandomK(0.05), interval=2, threshold=0.3),
]


def learning_rate(step):
    """It decays at step 7, in the middle of an interval."""
    return 0.5 if step < 7 else 0.25


def gradients(step, worker, dtype, shapes=SHAPES):
    """One worker's gradients of one step: four singular values that decay by halves, the same in all steps, and noise.

    Where singular values are close, as in noise alone, their subspaces turn at a touch, and rounding in the seventh
    digit grows to the third in 20 steps.
    """
    own = np.random.default_rng([step, worker])
    return {
        name: np.asarray(_smooth(shape) + 0.02 * own.standard_normal(shape), dtype) for name, shape in shapes.items()
    }


@functools.cache
def _smooth(shape):
    rng = np.random.default_rng(0)
    if len(shape) < 2:
        return rng.standard_normal(shape)
    parts = (
        0.5**i * np.multiply.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1:])) for i in range(4)
    )
    return sum(parts)


def tolerance(config, dtype, workers, steps):
    """How far from the reference an update or a memory may be, relative to its norm, after so many steps."""
    if sends_halves(config) and (dtype == "float32" or workers > 2):
        # Sums of three numbers in half precision depend on their order, and where the factors differ in the last
        # digit, some round the other way. A rounding is 2^-11; it turns a basis by as much times the condition
        # number of its factor, which is about 10 here, and a later step starts from that.
        return 16 * 2**-11 if steps == 1 else 64 * 2**-11
    if (isinstance(config, Int8) or getattr(config.family, "wire_dtype", None) == "int8") and dtype == "float32":
        # Where a number lies between two codes, up to a rounding, it travels as the one or the other; a mean's, of as
        # many times the difference in the memory of the worker that rounds it as there are workers.
        return 4 / 127
    if config.family.memory_dtype and dtype == "float32":
        # Where a number of the memory lies between two of 16 bits, up to a rounding of what decides, it becomes the one
        # or the other; they differ by at most 2^-7 of it.
        return 2**-10 if steps == 1 else 2**-8
    # Atomo sends singular vectors one by one: those of the noise turn by a rounding over the gap between their values.
    if steps == 1 and not isinstance(config, Atomo):
        return {"float32": 1e-5, "float64": 1e-12}[dtype]
    return {"float32": 1e-3, "float64": 1e-9}[dtype]


# What two rounds do that one does not.
IN_8_BITS = [
    (PowerSGD(rank=3, wire_dtype="int8"), "float64"),
    (PowerSGD(rank=2, wire_dtype="int8", num_iters_per_step=1), "float64"),
    (Accordion(PowerSGD(rank=3, wire_dtype="int8"), PowerSGD(rank=1, wire_dtype="int8"), interval=2), "float64"),
    (Int8(block=100), "float32"),
]


def in_two_rounds():
    """Averages in 8 bits take two rounds where it is entered, however few workers there are."""
    return mock.patch.object(quantization, "TWO_ROUNDS", 2)


def sends_halves(config):
    """Whether the workers' sum is in half precision."""
    return isinstance(config, Float16) or getattr(config, "wire_dtype", None) == "float16"


def error(found, expected, scale=None):
    """|found - expected| / |expected|, or / scale where that is larger."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return np.linalg.norm(found - expected) / (max(np.linalg.norm(expected), scale or 0) or 1)


def largest_error_of_a_repetition(workers):
    """What messages Horovod fuses depends on when they come, and so does the order in which it sums three workers'."""
    return 0 if workers <= 2 else 1e-5


def assert_close(found, expected, largest, what, scales=None):
    """Compares two dicts of arrays; `scales` are arrays next to which a small difference does not count.

    A memory is what is left of a delta: where all of it was sent, rounding of the delta is all that is left.
    """
    assert found.keys() == expected.keys(), what
    for name in expected:
        off = error(found[name], expected[name], np.linalg.norm(scales[name]) if scales else None)
        assert off <= largest, (what, name, off)


def simulated(config, dtype, workers, steps, matrix_shape=leading_rows):
    """The reference's run on these gradients: for each step the updates, each worker's memory, and Accordion's
    decisions so far."""
    states = [reference.State() for _ in range(workers)]
    run = []
    for step in range(steps):
        everyone = [gradients(step, w, dtype) for w in range(workers)]
        updates = reference.simulate(everyone, states, config, matrix_shape, learning_rate(step))
        decisions = {name: regime.decisions for name, regime in states[0].regimes.items()}
        run.append((updates[0], [dict(state.memory) for state in states], decisions))
    return run
