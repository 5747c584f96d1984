"""What one variable's gradient goes through in a step, as ops in a graph: one that is averaged as it is."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean, QuantizedMean
from horovod_powersgd.hosts import Host
from horovod_powersgd.tensorflow.host_mean import HostMean
from horovod_powersgd.tensorflow.variable import Assignment, plain_name
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Number, transportable


class Step(NamedTuple):
    """What is known of a step when it begins.

    Attributes:
        number: int64: how many were exchanged before.
        worker: int64: this one's number.
        workers: int64: how many there are.
        learning_rate: float64; None where it is not known.
        renews: whether it renews PowerSGD's subspaces.
        sends_halves: whether PowerSGD's factors travel in half precision, where they are to.
        host: this worker's, of int64 tensors, where two levels are asked for: SharedHost.now.
    """

    number: tf.Tensor
    worker: tf.Tensor
    workers: tf.Tensor
    learning_rate: tf.Tensor | None
    renews: bool
    sends_halves: bool
    host: Host | None


class PlainGradient:
    """A gradient that is averaged as it is.

    A step calls begin and then, as long as there is a request, receive; then the mean is there.

    Attributes:
        state: of the variable.
        request: what this worker sends: an AllreduceMean of one flat tensor or an Allgather of several, in a list; None
            when there is nothing more to be sent.
        mean: the average, in the dtype in which it was computed; not finite somewhere where something that came for it
            is not.
        finite: whether it is, and all that came for it; the same on every worker. None where Message.finite says it.
    """

    compressed = False
    finite: tf.Tensor | None = None
    request: AllreduceMean | QuantizedMean | Allgather | HostMean | None

    def __init__(self, state: VariableState, tensor: tf.Tensor):
        self.state = state
        self._tensor = shaped(tensor, state.layout.shape)

    @property
    def name(self) -> str:
        """The same on every worker, as variables' names need not be."""
        return f"{plain_name(self.state.name)} {self.state.layout.shape}"

    @property
    def sent_dtype(self) -> tf.DType:
        """Of what Horovod is given."""
        return transportable(self._tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Of the gradient."""
        return self._tensor.shape.num_elements() * self._tensor.dtype.size

    @property
    def kind(self) -> tf.DType:
        """What the gradients of a bucket have in common."""
        return self.sent_dtype

    def begin(self, step: Step) -> None:
        """Starts a step, up to the first request."""
        self.request = AllreduceMean([shaped(tf.cast(self._tensor, self.sent_dtype), (-1,))])

    def receive(self, answers: Sequence[tf.Tensor]) -> None:
        """Takes the answer: the flat average, or what was gathered, each (W, size)."""
        self.request = None
        self.mean = shaped(answers[0], self.state.layout.shape)

    def kept(self) -> list[Assignment]:
        """What the next step needs, where this one is finite."""
        return []


def shaped(tensor: tf.Tensor, shape: Sequence[Number]) -> tf.Tensor:
    """The tensor in a shape, of which one side may be -1; without an op where it is known to have that already."""
    if tensor.shape.rank == len(shape):
        known = zip(tensor.shape.as_list(), shape)
        if all(isinstance(side, int) and side in (-1, now) for now, side in known):
            return tensor
    return tf.reshape(tensor, shape)
