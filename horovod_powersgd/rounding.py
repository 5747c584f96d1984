"""Error-feedback memories in 16 bits a number (PowerSGD.memory_dtype), rounded stochastically: up with the probability
that what is cut off has of the distance. So nothing is lost on average, however small it is beside the memory; rounding
to nearest loses the same in every step (docs/evidence.md).

What is drawn for the entry in row i and column j is a_i + b_j + c, modulo the distance: a and b are the tensor's, c is
the step's and the worker's. Each is uniform by itself, and independent of those of other steps and workers; an entry
takes two additions.
"""

from typing import Any

from horovod_powersgd.randomness import MASK, SPARE, draw

# What a number in 16 bits lacks of single precision's bits.
BITS_CUT_OFF = {"bfloat16": 16, "float16": 13}
# A memory with less than this has the unit of one with this.
SMALLEST = 2.0**-100


def of_rows_and_columns(xp, key, rows, columns) -> tuple[Any, Any]:
    """a (rows,) and b (columns,), int32.

    Args:
        xp: the operations of the framework.
        key: from key_of.
        rows, columns: of the matrix.
    """
    drawn = xp.cast(draw(xp, key, SPARE - 1, xp.arange(rows + columns)) & 0xFFFF, "int32")
    return drawn[:rows], drawn[rows:]


def of_step(xp, step, worker) -> Any:
    """c, below 2^16.

    Args:
        xp: the operations of the framework.
        step: how many were exchanged before.
        worker: this one's number; in an exchange of two levels, its host's.
    """
    return draw(xp, 0, step, MASK - xp.integers(worker)) & 0xFFFF


def unit_of_halves(xp, largest) -> Any:
    """A power of two that a memory of "float16" is divided by: its largest number comes to 2^14 or more.

    Args:
        xp: the operations of the framework.
        largest: of the numbers' magnitudes, a float32 scalar.
    """
    return xp.power_of_two(xp.where(largest > SMALLEST, largest, SMALLEST)) * 2.0**-14


def rounded(xp, memory, dtype: str, rows, columns) -> Any:
    """The memory, in its own dtype, with no more bits than a number of this 16-bit dtype has. Those of "float16" are
    kept divided by a power of two, so that the largest is not too large.

    Args:
        xp: the operations of the framework.
        memory: (n, m), float32 or float64.
        dtype: "bfloat16" or "float16".
        rows, columns: (n,) and (m,) int32: a + c, and b.
    """
    cut_off = (1 << BITS_CUT_OFF[dtype]) - 1
    drawn = (rows[:, None] + columns[None, :]) & cut_off
    # As integers, floats of either sign grow with their magnitude.
    return xp.like(xp.floats((xp.bits(xp.cast(memory, "float32")) + drawn) & ~cut_off), memory)
