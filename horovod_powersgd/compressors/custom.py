"""Compressors of users' own."""

import functools
import inspect
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

from horovod_powersgd.compressors.compressor import Compressor


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

    def __post_init__(self) -> None:
        if not inspect.isgeneratorfunction(self.function):  # which a partial of one is, too
            raise TypeError(f"Custom: function must be a generator function, not {self.function!r}")
        self._check_bool("error_feedback")
        self._check_bool("linear")
        self._check_integer("seed", at_least=0)

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        return self.function(delta, state)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        raise TypeError("Custom: what it sends is known to its function only; see compression_stats()")

    def description(self) -> dict[str, Any]:
        # Not the function: a checkpoint is to be read without it, and workers are to agree on a text.
        return {"compressor": "Custom", **asdict(self), "function": _name(self.function)}

    def __repr__(self):
        return f"Custom({', '.join(f'{field}={value!r}' for field, value in self.description().items())})"


def _name(function: Callable) -> str:
    """Of a function, or a partial of one: the same on all workers."""
    if isinstance(function, functools.partial):
        arguments = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"partial({', '.join([_name(function.func), *arguments])})"
    return f"{function.__module__}.{function.__qualname__}"
