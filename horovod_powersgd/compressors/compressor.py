"""What all compressors have in common, and what they ask of the other workers."""

import functools
import inspect
import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any, Callable, ClassVar, Dict, Generator, Mapping, NamedTuple, Optional, Sequence, Tuple

from horovod_powersgd.layout import layout_of, leading_rows


@dataclass(frozen=True)
class AllreduceMean:
    """The request to average over all workers: a tensor; or several, by name. It is answered in the same form."""

    tensors: Any


@dataclass(frozen=True)
class Allgather:
    """The request for the tensors of all workers: a tuple of tensors; or several tuples, by name. It is answered in the
    same form, each tensor with the workers as first axis."""

    tensors: Any


class Traffic(NamedTuple):
    """Bytes that one worker hands to Horovod in a step, and bytes that it is handed back."""

    sent: int
    received: int


class Compressor:
    """A way to exchange gradients: pass one as `compression` to DistributedOptimizer.

    Subclasses are frozen dataclasses. Tensors with two axes or more are seen as matrices, as for PowerSGD; scalars and
    vectors are averaged as they are.

    Attributes:
        linear: whether what is sent is a linear function of the gradient, so that an allreduce adds it up. Otherwise
            the workers gather what all of them sent, which grows with their number.
        error_feedback: whether what one step left out is added to the next step's gradient.
        warmup_steps: this many first steps are exchanged uncompressed.
        low_rank: whether matrices travel as factors.
        refresh_every: every that many steps a step is another one than the rest (PowerSGD.refresh_every). None: none.
    """

    linear: ClassVar[bool]
    error_feedback: bool = True
    warmup_steps: int = 0
    low_rank: ClassVar[bool] = False
    refresh_every: Optional[int] = None
    seed: int = 0

    @property
    def family(self) -> "Compressor":
        """The compressor that says how matrices travel."""
        return self

    @property
    def keeps_memory(self) -> bool:
        """Whether each worker keeps delta - sent for its next step."""
        return self.error_feedback

    def obstacle(self, rows: int, columns: int) -> Optional[str]:
        """Why a matrix is averaged as it is; None where it is compressed."""
        return None

    def amount(self, rows: int, columns: int) -> int:
        """How much of a matrix is sent: the rank, or the number of entries; 0 where there is no choice."""
        return 0

    def exchange(self, delta, state) -> Generator:
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

    def traffic(
        self,
        shapes: Sequence[Tuple[int, ...]],
        workers: int,
        itemsize: int = 4,
        step: int = 0,
        matrix_shape: Callable = leading_rows,
    ) -> Traffic:
        """What one worker sends and receives in one step, as compression_stats() counts it.

        Args:
            shapes: of all tensors.
            workers: how many there are, W. An allreduce hands back as much as it is handed, an allgather W times.
            itemsize: bytes of a number of the gradients; bfloat16, which Horovod does not reduce, travels in 4.
            step: how many were exchanged before.
            matrix_shape: how a tensor is seen as a matrix: leading_rows in PyTorch, horovod_powersgd.layout's
                trailing_columns in TensorFlow.
        """
        sent = received = 0
        for shape in shapes if workers > 1 else ():
            layout = layout_of(shape, self, matrix_shape)
            if layout.compressed and step >= self.warmup_steps:
                # What is computed from half precision is in single precision.
                size = self.message_bytes(*layout.matrix_shape, max(itemsize, 4), step)
                sent, received = sent + size, received + size * (1 if self.linear else workers)
            else:
                sent, received = (total + math.prod(shape) * itemsize for total in (sent, received))
        return Traffic(sent, received)

    def description(self) -> Dict[str, Any]:
        """Its name and fields, for checkpoints: plain numbers and strings."""
        return {"compressor": type(self).__name__, **asdict(self)}

    def compress(self, tensor):
        """What Horovod's own functions would call; a compressor is not for them.

        Raises:
            TypeError: always, with what to do.
        """
        raise _not_for("hvd.allreduce and its kind", self)

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
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"{name}: {field} must be a finite number, {allowed}, not {value!r}")
        object.__setattr__(self, field, float(value))


@dataclass(frozen=True)
class Custom(Compressor):
    """A compressor of your own, in one generator function. Given as `compression`, the function itself will do.

    Args:
        function: as Compressor.exchange, of (delta, state).
        error_feedback: whether delta has the memory in it, which becomes delta - sent.
        linear: whether it only asks for means; what compression_stats() counts does not depend on it.
        seed: of state.key.
    """

    function: Callable
    error_feedback: bool = True
    linear: bool = True
    seed: int = 0

    def __post_init__(self):
        if not inspect.isgeneratorfunction(self.function):  # which a partial of one is, too
            raise TypeError(f"Custom: function must be a generator function, not {self.function!r}")
        self._check_bool("error_feedback")
        self._check_bool("linear")
        self._check_integer("seed", at_least=0)

    def exchange(self, delta, state):
        return self.function(delta, state)

    def message_bytes(self, rows, columns, itemsize, step=0):
        raise TypeError("Custom: what it sends is known to its function only; see compression_stats()")

    def description(self):
        # Not the function: a checkpoint is to be read without it, and workers are to agree on a text.
        return {"compressor": "Custom", **asdict(self), "function": _name(self.function)}

    def __repr__(self):
        return f"Custom({', '.join(f'{field}={value!r}' for field, value in self.description().items())})"


def _name(function: Callable) -> str:
    """In words that are the same on all workers."""
    if isinstance(function, functools.partial):
        arguments = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"partial({', '.join([_name(function.func), *arguments])})"
    return f"{function.__module__}.{function.__qualname__}"


def compressor_of(compression) -> Optional[Compressor]:
    """The compressor that a user's `compression` means; None where it is one of Horovod's.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(compression, Compressor):
        return compression
    if inspect.isgeneratorfunction(compression):
        return Custom(compression)
    is_our_class = inspect.isclass(compression) and issubclass(compression, Compressor)
    if hasattr(compression, "decompress") and not is_our_class:
        return None
    raise TypeError(
        "compression must be a compressor such as hvd.PowerSGD(...), a generator function, or one of Horovod's, "
        f"hvd.Compression.none or hvd.Compression.fp16, not {compression!r}"
    )


def refuse_misplaced(arguments: Mapping[str, Any]) -> None:
    """Refuses a compressor in an argument's place that is not its own, where it would do nothing without a word.

    Args:
        arguments: of a function, by name: its locals() before it does anything.

    Raises:
        TypeError: another one than `compression` is a compressor.
    """
    for name, value in arguments.items():
        if name != "compression" and isinstance(value, Compressor):
            raise TypeError(f"{value!r} was given as {name}: give a compressor by name, as compression=...")


def without_compressors(function: Callable) -> Callable:
    """A function of Horovod's that refuses compressors, whichever argument they are given as.

    The one returned raises a TypeError then.
    """

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, Compressor):
                raise _not_for(f"hvd.{function.__name__}", value)
        return function(*args, **kwargs)

    return checked


def _not_for(function: str, compressor: Compressor) -> TypeError:
    return TypeError(
        f"{function} takes hvd.Compression.none or hvd.Compression.fp16, not {compressor!r}, which compresses "
        "gradients from step to step: give it as compression= to a DistributedOptimizer or a DistributedGradientTape"
    )


def refusal_of_join(compressor: Optional[Compressor]) -> str:
    """What to tell users where a worker has joined and the others gather.

    Args:
        compressor: that gathers; None where it is sparse gradients that are gathered.
    """
    who = "sparse gradients are gathered" if compressor is None else f"{compressor!r} gathers what the workers send"
    instead = "Use a compressor whose attribute `linear` is true, such as PowerSGD or RandomK"
    return (
        f"A worker has called hvd.join(), and {who}, which Horovod cannot do then. "
        f"{'Set sparse_as_dense=True' if compressor is None else instead}, or give all workers as many steps."
    )
