"""Compressors that send one bit of each entry (PowerSGD paper, appendix, "Compressors")."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.collectives import Allgather
from horovod_powersgd.compressors.compressor import Compressor


@dataclass(frozen=True)
class SignNorm(Compressor):
    """Sends the signs of a matrix's entries and their mean magnitude (Sign+Norm; PowerSGD paper, appendix; Karimireddy
    et al., "Error Feedback Fixes SignSGD", ICML 2019, section 4): sign(M) |M|_1 / (n m), averaged over the workers.

    Not linear: the workers gather each other's n m bits, and one number. The sign of zero is plus.

    Args:
        error_feedback: add what one step left out to the next step's gradient.

    Raises:
        TypeError: error_feedback is neither True nor False.
    """

    error_feedback: bool = True
    linear = False

    def __post_init__(self) -> None:
        self._check_bool("error_feedback")

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, size = state.arrays, state.shape[0] * state.shape[1]
        flat = xp.reshape(delta, (-1,))
        norm = xp.reshape(xp.mean(abs(flat)), (1,))
        bits, norms = yield Allgather((xp.pack_bits(flat >= 0), norm))
        update = xp.mean(norms * _signs(xp, xp.unpack_bits(bits, size), delta), axis=0)
        return update, norm * _signs(xp, flat >= 0, delta)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return math.ceil(rows * columns / 8) + itemsize


@dataclass(frozen=True)
class Signum(Compressor):
    """Sends the signs of each worker's momentum and goes where most of them point (Bernstein et al., "signSGD with
    Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019, algorithm 1): m = momentum m + (1 -
    momentum) gradient, and the update is sign(sum over the workers of sign(m)), whose entries are 1, -1, or 0 where the
    workers are divided.

    Not linear: the workers gather each other's n m bits, and one bit that says whether the gradient is finite. The sign
    of zero is plus, so that what has no gradient on any worker moves all the same. There is no error feedback; in the
    memory's place the momentum is kept, without the factor 1 - momentum, which changes no sign.

    Use a wrapped optimizer without a momentum of its own, and a learning rate that is small: an update's entries are of
    size 1 (the PowerSGD paper took a 2000th of SGD's). Scalars and vectors, which are averaged as they are, want SGD's
    own rate and momentum: put them into a parameter group of their own.

    Args:
        momentum: at least 0 and below 1.

    Raises:
        TypeError: momentum is no number.
        ValueError: momentum is outside what is allowed.
    """

    momentum: float = 0.9
    error_feedback = False
    linear = False
    keeps_memory = True

    def __post_init__(self) -> None:
        self._check_number("momentum", "at least 0 and below 1", lambda momentum: 0 <= momentum < 1)

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        xp, size = state.arrays, state.shape[0] * state.shape[1]
        positive = xp.reshape(delta, (-1,)) >= 0
        finite = xp.reshape(xp.cast(state.finite, "bool"), (1,))
        (packed,) = yield Allgather((xp.pack_bits(xp.concat([finite, positive])),))
        bits = xp.unpack_bits(packed, size + 1)
        votes = xp.sign(xp.sum(_signs(xp, bits[:, 1:], delta), axis=0))
        # 1, or NaN: which is not computed where all is well, as some debuggers would tell of it.
        mark = xp.sqrt(2 * xp.like(xp.all(bits[:, 0]), delta) - 1)
        return votes * mark, (1 - self.momentum) * delta

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        return math.ceil((rows * columns + 1) / 8)


def _signs(xp, positive, delta):
    """1 or -1, in delta's dtype."""
    return 2 * xp.like(positive, delta) - 1
