"""Which tensors are exchanged together."""

import math
import zlib
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

import numpy as np

# A bucket is closed when its gradients take this many bytes: few enough to start early in backward, enough to pay
# for a round of messages.
BUCKET_BYTES = 25 * 2**20
# On a GPU, which computes gradients faster, and takes the host as long to ask for little as for much (docs/gpu.md).
GPU_BUCKET_BYTES = 100 * 2**20
# A gradient that is averaged as it is travels alone from this size on: copying it costs more than a message.
ALONE_BYTES = 64 * 2**10


class Sendable(Protocol):
    """A gradient as buckets see it.

    Attributes:
        name: the same on every worker.
        kind: what all gradients of a bucket must have in common.
        nbytes: of the gradient.
        compressed: whether it travels as factors.
    """

    name: str
    kind: Hashable
    nbytes: int
    compressed: bool


Gradient = TypeVar("Gradient", bound=Sendable)


def sort_into_buckets(
    gradients: Sequence[Gradient],
    groups: None | int | Sequence[Sequence[Gradient]] = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[list[Gradient]]:
    """Sorts gradients into buckets, the same on every worker.

    Args:
        gradients: in the order of registration. Backward computes them about the other way round.
        groups: Horovod's: their number, or lists of the gradients that belong together; what is in none of the
            lists is sorted by size, as all is without groups.
        bucket_bytes: what closes a bucket.
    """
    if isinstance(groups, int):
        groups = [[gradients[i] for i in part] for part in np.array_split(range(len(gradients)), groups)]
    grouped = {id(gradient) for group in groups or () for gradient in group}
    buckets = [bucket for group in groups or () for bucket in _fill(group, math.inf, math.inf)]
    return buckets + _fill([g for g in gradients if id(g) not in grouped], bucket_bytes, ALONE_BYTES)


def bucket_name(number: int, gradients: Sequence[Sendable]) -> str:
    """Tells buckets of different gradients apart: workers that freeze different layers must not average them."""
    return f"{number}.{zlib.crc32(chr(10).join(gradient.name for gradient in gradients).encode()):x}"


def _fill(gradients: Sequence[Gradient], bucket_bytes: float, alone_bytes: float) -> list[list[Gradient]]:
    """Buckets of one kind each, last gradient first."""
    filling: dict[Hashable, list[Gradient]] = {}
    room: dict[Hashable, float] = {}
    full: list[list[Gradient]] = []
    for gradient in reversed(gradients):
        if not gradient.compressed and gradient.nbytes >= alone_bytes:
            full.append([gradient])
            continue
        filling.setdefault(gradient.kind, []).append(gradient)
        room[gradient.kind] = room.get(gradient.kind, bucket_bytes) - gradient.nbytes
        if room[gradient.kind] <= 0:
            full.append(filling.pop(gradient.kind))
            del room[gradient.kind]
    return full + list(filling.values())
