"""The arguments of distributed optimizers and tapes: what is allowed, and what a compressor may be given for."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from horovod_powersgd.compressors.compressor import Compressor, misplaced
from horovod_powersgd.compressors.custom import Custom


def compressor_of(compression) -> Compressor | None:
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


def required_compressor(compression) -> Compressor:
    """compressor_of, where Horovod's own compressions have no place.

    Raises:
        TypeError: compression is neither a compressor nor a generator function.
    """
    compressor = compressor_of(compression)
    if compressor is None:
        raise TypeError(f"compression must be a compressor or a generator function here, not {compression!r}")
    return compressor


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
                raise misplaced(f"hvd.{function.__name__}", value)
        return function(*args, **kwargs)

    return checked


def check_op(compressor: Compressor | None, averages_or_sums: bool) -> None:
    """Checks that a compressor has an op that it can serve.

    Args:
        compressor: None for Horovod's own compressions.
        averages_or_sums: whether op is hvd.Average or hvd.Sum.

    Raises:
        ValueError: it is another one.
    """
    if compressor is not None and not averages_or_sums:
        name = type(compressor).__name__
        raise ValueError(f"{name} averages or sums gradients: op must be hvd.Average or hvd.Sum (Adasum is neither)")


def check_predivide_factor(factor: float, averages: bool, rocm: bool) -> None:
    """Checks gradient_predivide_factor, as Horovod does.

    Args:
        factor: as given.
        averages: whether op is hvd.Average.
        rocm: whether Horovod was built for ROCm.

    Raises:
        ValueError: it is not 1, and op or Horovod do not allow that.
    """
    if factor != 1.0 and rocm:
        raise ValueError("gradient_predivide_factor not supported yet with ROCm")
    if factor != 1.0 and not averages:
        raise ValueError("gradient_predivide_factor not supported with op != Average")


def check_passes(backward_passes_per_step: int) -> None:
    """Checks backward_passes_per_step.

    Raises:
        ValueError: it is 0 or less.
    """
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")


def groups_of(num_groups: int, groups):
    """The groups that are meant by num_groups, which warns of its age, and by groups, which goes before it."""
    if num_groups == 0:
        return groups
    warnings.warn("Parameter `num_groups` has been replaced by `groups`.", DeprecationWarning, stacklevel=3)
    return num_groups if groups is None else groups
