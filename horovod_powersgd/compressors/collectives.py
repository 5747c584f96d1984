"""What compressors ask of the other workers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AllreduceMean:
    """The request to average over all workers: a tensor; or several, by name. It is answered in the same form."""

    tensors: Any


@dataclass(frozen=True)
class QuantizedMean:
    """The request to average over all workers in 8 bits a number: a matrix of floats, each row of which gets a
    unit of its own; or several, by name. It is answered with the mean and this worker's part of it: what is left of the
    matrix when the part is taken away is what rounding lost. The mean of all workers' parts is the mean.

    A flat tensor is taken as rows of `row` numbers, of which the last may have fewer; several, as that says by name.
    """

    tensors: Any
    row: Any = None


@dataclass(frozen=True)
class Allgather:
    """The request for the tensors of all workers: a tuple of tensors; or several tuples, by name. It is answered in the
    same form, each tensor with the workers as first axis."""

    tensors: Any


def refusal_of_join(compressor: Any) -> str:
    """What to tell users where a worker has joined and the others gather.

    Args:
        compressor: that gathers, or exchanges in two levels; None where it is sparse gradients that are gathered.
    """
    if compressor is None:
        who, instead = "sparse gradients are gathered", "Set sparse_as_dense=True"
    elif compressor.linear:
        who = f"with {compressor!r} the workers of a host send each other their gradients"
        instead = "Leave out hierarchical=True"
    else:
        who = f"{compressor!r} gathers what the workers send"
        instead = "Use a compressor whose attribute `linear` is true, such as PowerSGD or RandomK"
    return (
        f"A worker has called hvd.join(), and {who}, which Horovod cannot do then. "
        f"{instead}, or give all workers as many steps."
    )
