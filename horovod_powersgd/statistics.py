"""What compression did in the last step and so far."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.layout import Layout


@dataclass(frozen=True)
class TensorStats:
    """One tensor in the last step.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        matrix_shape: (rows, columns) that it is seen as; None for scalars and vectors that are not compressed.
        rank: of its factors; 0 if it does not travel as factors.
        compressed: whether it travels compressed.
        reason: why not; None if it does.
        residual: |e| / |delta|, the part of gradient plus memory that stayed in the memory, between 0 and 1 where
            what is sent approximates delta; 0 where the tensor is not compressed, None before the first step and
            without error feedback.
        decisions: Accordion's, each (step, "low" or "high"): the compression from that step on.
        chosen: by Auto: "none", or the compressor in words; None without it.
        predicted_step, measured_step: seconds that Auto predicted, and measured, of a whole step with what it has
            chosen; None where it has not yet.
    """

    name: str
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int] | None
    rank: int
    compressed: bool
    reason: str | None
    residual: float | None
    decisions: tuple[tuple[int, str], ...] = ()
    chosen: str | None = None
    predicted_step: float | None = None
    measured_step: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        layout: Layout,
        compressor: Compressor,
        is_sparse: bool,
        warming_up: bool,
        residual: Callable[[], float | None],
        decisions: tuple[tuple[int, str], ...] = (),
    ) -> "TensorStats":
        """A tensor whose gradient was sparse or not, in warm-up or not; the residual is asked for where it counts."""
        reason = layout.reason
        if reason is None and is_sparse:
            reason = "sparse"
        elif reason is None and warming_up:
            reason = "warm-up"
        rank = 0
        if reason is None and compressor.low_rank:
            rank = layout.amount
            if isinstance(compressor, Accordion) and decisions:
                rank = compressor.amount_now(*layout.matrix, decisions[-1][1] == "low")
        return cls(
            name=name,
            shape=layout.shape,
            matrix_shape=layout.matrix_shape,
            rank=rank,
            compressed=reason is None,
            reason=reason,
            residual=residual() if reason is None else 0.0,
            decisions=decisions,
        )


def residual(left: float, sent: float) -> float:
    """|e| / |delta| from |e| and the norm of what was sent: they are orthogonal, and together they are delta."""
    return left / math.hypot(left, sent) if left else 0.0


@dataclass(frozen=True)
class CompressionStats:
    """All tensors in the last step and in all steps so far. Bytes are payload: no headers, no other worker's.

    Attributes:
        steps: exchanged with finite results.
        bytes_sent: that this worker handed to allreduce and allgather in the last step; 0 where it is the only worker.
        bytes_received: that those handed back: of an allreduce as many, of an allgather those of all workers.
        bytes_uncompressed: that plain allreduce would have been handed.
        ratio: how many times fewer bytes that was; infinite where nothing was sent.
        total_bytes_sent: in all steps.
        total_bytes_received: in all steps.
        total_bytes_uncompressed: in all steps.
        total_ratio: how many times fewer.
        tensors: in the order of registration.
        flat_because: why the exchange has one level where two were asked for (PowerSGD.hierarchical); None where
            nobody asked, where it has two, and before the first step.
    """

    steps: int
    bytes_sent: int
    bytes_received: int
    bytes_uncompressed: int
    ratio: float = field(init=False)
    total_bytes_sent: int
    total_bytes_received: int
    total_bytes_uncompressed: int
    total_ratio: float = field(init=False)
    tensors: tuple[TensorStats, ...]
    flat_because: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "ratio", _ratio(self.bytes_uncompressed, self.bytes_sent))
        object.__setattr__(self, "total_ratio", _ratio(self.total_bytes_uncompressed, self.total_bytes_sent))


def _ratio(uncompressed: int, sent: int) -> float:
    if sent:
        return uncompressed / sent
    return math.inf if uncompressed else 1.0
