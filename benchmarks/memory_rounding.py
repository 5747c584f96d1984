"""Measures what an error-feedback memory in 16 bits loses, by how it is rounded: PowerSGD's memory_dtype.

    python benchmarks/memory_rounding.py            # in about four minutes on one core

4 workers, a 60 x 40 matrix and rank 2. A block of each gradient, of 30 rows and 20 columns, is standard normal, new in
each step; in the block that has no row and no column with it in common is a constant, the same in all steps and on all
workers: standard normal times so small a number that one step adds less to the memory than its last bit says. What was
given of the constant has to be in the updates or in the mean of the memories.
"""

import sys

import numpy as np

from horovod_powersgd import PowerSGD, reference, rounding

WORKERS, SHAPE, RANK = 4, (60, 40), 2
NOISY, CONSTANT = (slice(0, 30), slice(0, 20)), (slice(30, None), slice(20, None))
CONSTANTS = 2e-3, 5e-4, 1e-4
STEPS = 100, 1000, 5000


def nearest(memory, dtype):
    """Rounded to nearest."""
    bits, cut_off = rounding.BITS_CUT_OFF[dtype], (1 << rounding.BITS_CUT_OFF[dtype]) - 1
    whole = memory.view(np.int32)
    return ((whole + (cut_off >> 1) + (whole >> bits & 1)) & ~np.int32(cut_off)).view(np.float32)


def fed_back(memory, dtype):
    """Rounded to nearest, after what the column before has lost was added."""
    found, lost = np.empty_like(memory), np.zeros(len(memory), np.float32)
    for j in range(memory.shape[1]):
        wanted = memory[:, j] + lost
        found[:, j] = nearest(wanted, dtype)
        lost = wanted - found[:, j]
    return found


def pattern():
    matrix = np.zeros(SHAPE)
    matrix[CONSTANT] = np.random.default_rng(0).standard_normal(SHAPE)[CONSTANT]
    return matrix


def gradients(step, size):
    """Each worker's."""
    for worker in range(WORKERS):
        noise = np.random.default_rng([step, worker]).standard_normal(SHAPE)
        gradient = 1e-6 * noise + size * pattern()
        gradient[NOISY] = noise[NOISY]
        yield {"w": gradient.astype(np.float32)}


def measure(config, after, size):
    """The largest |e| of a worker after each of STEPS, and the part of the constant that was lost.

    Args:
        config: of the exchange.
        after: rounds a memory after each step.
        size: of the constant.
    """
    states, norms = [reference.State() for _ in range(WORKERS)], []
    sent, given = np.zeros(SHAPE), np.zeros(SHAPE)
    for step in range(STEPS[-1]):
        everyone = list(gradients(step, size))
        sent += reference.simulate(everyone, states, config)[0]["w"]
        given += np.mean([theirs["w"] for theirs in everyone], axis=0, dtype=np.float64)
        for state in states:
            state.memory["w"] = after(state.memory["w"])
        if step + 1 in STEPS:
            norms.append(max(np.linalg.norm(state.memory["w"]) for state in states))
    left = np.mean([state.memory["w"] for state in states], axis=0, dtype=np.float64)
    constant = pattern()
    return norms, ((given - sent - left) * constant).sum() / (given * constant).sum()


def roundings():
    yield "float32", PowerSGD(RANK), lambda memory: memory
    for dtype in rounding.BITS_CUT_OFF:
        for rule in (nearest, fed_back):
            yield f"{dtype}, {rule.__name__}", PowerSGD(RANK), lambda memory, r=rule, d=dtype: r(memory, d)
        yield f"{dtype}, stochastically", PowerSGD(RANK, memory_dtype=dtype), lambda memory: memory


if __name__ == "__main__":
    sizes = [float(word) for word in sys.argv[1:]] or CONSTANTS
    print("memory, and how it is rounded; |e| after", *STEPS, "steps; part of the constant that is lost")
    for size in sizes:
        for name, config, after in roundings():
            norms, lost = measure(config, after, size)
            print(f"{size:.0e}  {name:<28}" + "".join(f"{norm:8.1f}" for norm in norms) + f"{lost:9.2%}", flush=True)
