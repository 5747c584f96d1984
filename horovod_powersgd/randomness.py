"""Random numbers that all workers, in every framework, draw alike: each is computed from its place.

Integers of 31 bits, whose products fit into the 64 bits that every framework has.
"""

import math
import zlib
from typing import Any

MASK = 2**31 - 1
ROUNDS = 6
# A step that no training reaches.
SPARE = MASK


def key_of(name: str, seed: int) -> int:
    """What a tensor's random numbers are drawn from."""
    return zlib.crc32(f"{seed} {name}".encode()) & MASK


def draw(xp, key, step, places) -> Any:
    """Numbers from 0 to 2^31 - 1.

    Args:
        xp: the operations of the framework.
        key: from key_of.
        step: another one gives other numbers.
        places: int64, of the numbers.
    """
    return _apart(xp, _draw, key, step, places)


def _draw(xp, key, step, places):
    key = _mix(xp, _mix(xp, xp.integers(key)) ^ (xp.integers(step) & MASK))
    return _mix(xp, _mix(xp, places & MASK) ^ key)


def uniform(xp, key, step, places) -> Any:
    """float64 numbers, above 0 and below 1."""
    return (xp.cast(draw(xp, key, step, places), "float64") + 0.5) / 2**31


def normal(xp, key, step, places) -> Any:
    """Independent standard normal numbers, float64 (Box and Muller 1958)."""
    radius = xp.sqrt(-2 * xp.log(uniform(xp, key, step, 2 * places)))
    return radius * xp.cos(2 * math.pi * uniform(xp, key, step, 2 * places + 1))


def random_factor(xp, key, step, length, rank) -> Any:
    """A factor of independent standard normal numbers, (length, rank), float64.

    Args:
        xp: the operations of the framework.
        key: from key_of.
        step: that starts from it; SPARE for columns that take the place of others, or are added to them.
        length: n of P, m of Q.
        rank: r.
    """
    return _apart(xp, _random_factor, key, step, length, rank)


def _random_factor(xp, key, step, length, rank):
    return xp.reshape(normal(xp, key, step, xp.arange(length * rank)), (length, rank))


def subset(xp, key, step, size: int, count) -> Any:
    """`count` different numbers below `size`, each subset as likely as any other; int64, in random order.

    They are where a permutation takes 0 to count - 1: a Feistel network of the two digits of a number, in a base near
    the root of the size. What it takes beyond the size it takes on (Black and Rogaway 2002).
    """
    base = math.isqrt(size - 1) + 1
    return _apart(xp, _subset, key, step, size, base, -(-size // base), count)


def _subset(xp, key, step, size, base, highest, count):
    def permute(x):
        high, low = x // base, x % base
        for i in range(ROUNDS):
            if i % 2:
                low = (low + draw(xp, key, step, high * ROUNDS + i)) % base
            else:
                high = (high + draw(xp, key, step, low * ROUNDS + i)) % highest
        return high * base + low

    start = permute(xp.arange(count))
    return xp.until(lambda x: xp.all(x < size), lambda x: xp.where(x < size, x, permute(x)), start)


def _apart(xp, function, *integers):
    """function(xp, *integers). A graph of TensorFlow has room for it once, not for each tensor."""
    return xp.apart(function, *integers) if hasattr(xp, "apart") else function(xp, *integers)


def _mix(xp, x):
    """A permutation of the numbers below 2^31, in which each bit depends on all bits."""
    for bits, factor in ((16, 0x45D9F3B), (15, 0x7FEB352D), (16, 0x2C1B3C6D)):
        x = ((x ^ xp.shift_right(x, bits)) * factor) & MASK
    return x ^ xp.shift_right(x, 15)
