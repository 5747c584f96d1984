"""What all compressors have in common."""

import math
import numbers
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

from horovod_powersgd import quantization
from horovod_powersgd.layout import layout_of, leading_rows


class Traffic(NamedTuple):
    """Bytes that one worker hands to Horovod in a step, and bytes that it is handed back."""

    sent: int
    received: int


class Compressor:
    """A way to exchange gradients: pass one as `compression` to DistributedOptimizer.

    Subclasses are frozen dataclasses. Tensors with two axes or more are seen as matrices, as for PowerSGD; scalars and
    vectors are averaged as they are, unless it takes them, too.

    Attributes:
        linear: whether what is sent is a linear function of the gradient, so that an allreduce adds it up. Otherwise
            the workers gather what all of them sent, which grows with their number.
        error_feedback: whether what one step left out is added to the next step's gradient.
        warmup_steps: this many first steps are exchanged uncompressed.
        low_rank: whether matrices travel as factors.
        refresh_every: every that many steps a step is another one than the rest (PowerSGD.refresh_every). None: none.
        hierarchical: whether the exchange is to have two levels, where it can (PowerSGD.hierarchical).
        memory_dtype: of the memory, where it has 16 bits a number (PowerSGD.memory_dtype).
        takes_vectors: whether scalars and vectors travel compressed, too.
    """

    linear: bool
    error_feedback: bool = True
    warmup_steps: int = 0
    low_rank: bool = False
    refresh_every: int | None = None
    seed: int = 0
    hierarchical: bool | None = None
    memory_dtype: str | None = None
    takes_vectors: bool = False
    # A subclass's.
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def family(self) -> "Compressor":
        """The compressor that says how matrices travel."""
        return self

    @property
    def keeps_memory(self) -> bool:
        """Whether each worker keeps delta - sent for its next step."""
        return self.error_feedback

    def obstacle(self, rows: int, columns: int) -> str | None:
        """Why a matrix is averaged as it is; None where it is compressed."""
        return None

    def amount(self, rows: int, columns: int) -> int:
        """How much of a matrix is sent: the rank, or the number of entries; 0 where there is no choice."""
        return 0

    def renews(self, step: int) -> bool:
        """Whether the step that comes after so many steps is such a one as refresh_every speaks of."""
        return False

    def sends_halves(self, step: int) -> bool:
        """Whether the factors of the step that comes after so many steps travel in half precision; in TensorFlow both
        are tensors."""
        return False

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        """One worker's side of the exchange of one matrix.

        Args:
            delta: (n, m), gradient plus memory; finite.
            state: a MatrixState (horovod_powersgd.compressors.matrix_state).

        Yields:
            AllreduceMean or Allgather, the same on every worker; is resumed with the answer.

        Returns:
            (update, sent): what the gradient becomes, (n, m) or (n * m,), the same on every worker; and what this
            worker's part of it was, which leaves the memory: that becomes delta - sent. None where no memory is kept.
        """
        raise NotImplementedError

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        """What a worker sends of one matrix in one step.

        Args:
            rows, columns: of the matrix.
            itemsize: bytes of a number of the gradient.
            step: how many were exchanged before.
        """
        raise NotImplementedError

    def round_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> list[int]:
        """message_bytes, by the messages of which one waits for the other; the same number of them for all matrices."""
        return [self.message_bytes(rows, columns, itemsize, step)]

    def quantized_rows(self, rows: int, columns: int, step: int = 0) -> list[list[int]]:
        """For each QuantizedMean of one matrix in one step, the lengths of the rows that it averages; then nothing else
        is sent of it.

        Args:
            rows, columns: of the matrix.
            step: how many were exchanged before.
        """
        return []

    def traffic(
        self,
        shapes: Sequence[tuple[int, ...]],
        workers: int,
        itemsize: int = 4,
        step: int = 0,
        matrix_shape: Callable = leading_rows,
        workers_per_host: int = 1,
    ) -> Traffic:
        """What one worker sends and receives in one step, as compression_stats() counts it where all gradients are in
        one bucket; what QuantizedMean averages takes some bytes more in several.

        Args:
            shapes: of all tensors.
            workers: how many there are, W. An allreduce hands back as much as it is handed, an allgather W times.
            itemsize: bytes of a number of the gradients; bfloat16, which Horovod does not reduce, travels in 4.
            step: how many were exchanged before.
            matrix_shape: how a tensor is seen as a matrix: leading_rows in PyTorch, horovod_powersgd.layout's
                trailing_columns in TensorFlow.
            workers_per_host: in an exchange of two levels (horovod_powersgd.hosts), whose messages inside hosts do not
                count. 1: in one of one level.
        """
        sent = received = 0
        means: list[list[int]] = []
        for shape in shapes if workers > 1 else ():
            layout = layout_of(shape, self, matrix_shape)
            if layout.compressed and step >= self.warmup_steps:
                if of_matrix := self.quantized_rows(*layout.matrix, step):
                    means = means or [[] for _ in of_matrix]
                    for lengths, more in zip(means, of_matrix, strict=True):
                        lengths[:0] = more  # the last gradient first, as in a bucket
                    continue
                # What is computed from half precision is in single precision.
                size = self.message_bytes(*layout.matrix, max(itemsize, 4), step)
                sent, received = sent + size, received + size * (1 if self.linear else workers)
            else:
                sent, received = (total + math.prod(shape) * itemsize for total in (sent, received))
        for lengths in means:
            both = quantization.traffic(lengths, workers, max(itemsize, 4), workers_per_host)
            sent, received = sent + both[0], received + both[1]
        return Traffic(sent, received)

    def description(self) -> dict[str, Any]:
        """Its name and fields, for checkpoints: plain numbers and strings."""
        return {"compressor": type(self).__name__, **asdict(self)}

    def compress(self, tensor):
        """What Horovod's own functions would call; a compressor is not for them.

        Raises:
            TypeError: always, with what to do.
        """
        raise misplaced("hvd.allreduce and its kind", self)

    decompress = compress

    def _check_integer(self, field: str, at_least: int) -> None:
        value, name = getattr(self, field), type(self).__name__
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}: {field} must be an integer, {at_least} or more, not {value!r}")
        if value < at_least:
            raise ValueError(f"{name}: {field} must be {at_least} or more, not {value!r}")
        # The workers compare their configurations' texts, and a checkpoint holds them: plain numbers only.
        object.__setattr__(self, field, int(value))

    def _check_bool(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, bool):
            raise TypeError(f"{type(self).__name__}: {field} must be True or False, not {value!r}")

    def _check_number(self, field: str, allowed: str, holds: Callable[[float], bool]) -> None:
        value, name = getattr(self, field), type(self).__name__
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name}: {field} must be a number, {allowed}, not {value!r}")
        if not (math.isfinite(value) and holds(float(value))):
            raise ValueError(f"{name}: {field} must be a finite number, {allowed}, not {value!r}")
        object.__setattr__(self, field, float(value))


def misplaced(function: str, compressor: Compressor) -> TypeError:
    """The error where a compressor is given to a function of Horovod's."""
    return TypeError(
        f"{function} takes hvd.Compression.none or hvd.Compression.fp16, not {compressor!r}, which compresses "
        "gradients from step to step: give it as compression= to a DistributedOptimizer or a DistributedGradientTape"
    )
