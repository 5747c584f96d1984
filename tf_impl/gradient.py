"""What one variable's gradient goes through in a step: ops in a graph."""

from typing import Generator, List, NamedTuple, Optional, Sequence, Tuple, Union

import tensorflow as tf

from horovod_powersgd.compressors.compressor import Allgather, AllreduceMean
from horovod_powersgd.compressors.matrix_state import MatrixState
from horovod_powersgd.tensorflow import arrays
from horovod_powersgd.tensorflow.built_once import marked, zeros_unless
from horovod_powersgd.tensorflow.state import VariableState, plain_name
from horovod_powersgd.tensorflow.workers import transportable


class Step(NamedTuple):
    """What is known of a step when it begins.

    Attributes:
        number: int64: how many were exchanged before.
        worker: int64: this one's number.
        workers: int64: how many there are.
        learning_rate: float64; None where it is not known.
        renews: whether it renews PowerSGD's subspaces.
    """

    number: tf.Tensor
    worker: tf.Tensor
    workers: tf.Tensor
    learning_rate: Optional[tf.Tensor]
    renews: bool


class PlainGradient:
    """A gradient that is averaged as it is.

    A step calls begin and then, as long as there is a request, receive; then mean and finite are there.

    Attributes:
        state: of the variable.
        request: what this worker sends: an AllreduceMean of one flat tensor or an Allgather of several, in a list; None
            when there is nothing more to be sent.
        mean: the average, in the dtype in which it was computed; not a number, somewhere, where it is not finite.
        finite: whether it is; the same on every worker.
    """

    compressed = False

    def __init__(self, state: VariableState, tensor: tf.Tensor):
        self.state = state
        self._tensor = tf.reshape(tensor, state.layout.shape)

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
    def kind(self) -> Tuple[tf.DType, str]:
        """What the gradients of a bucket have in common."""
        return self.sent_dtype, self._tensor.device

    def begin(self, step: Step) -> None:
        """Starts a step, up to the first request."""
        self.request = AllreduceMean([tf.reshape(tf.cast(self._tensor, self.sent_dtype), [-1])])

    def receive(self, answers: Sequence[tf.Tensor]) -> None:
        """Takes the answer: the flat average, or what was gathered, each (W, size)."""
        self.request = None
        self.mean = tf.reshape(answers[0], self.state.layout.shape)
        self.finite = all_finite([self.mean])

    def commit(self) -> List[tf.Operation]:
        """The ops that keep what the next step needs, where this one is finite."""
        return []


class MatrixGradient(PlainGradient):
    """A gradient that travels as its compressor's generator says: reference.exchange of one matrix."""

    compressed = True

    @property
    def sent_dtype(self) -> tf.DType:
        return self.state.dtype

    def begin(self, step: Step) -> None:
        state, amount = self.state, self.state.layout.amount
        self._delta = tf.reshape(tf.cast(self._tensor, state.dtype), state.layout.matrix_shape)
        if state.memory is not None:
            self._delta += state.memory
        if state.adaptation is not None:
            self._decision = state.adaptation.decide(step.number, step.learning_rate)
            amount = state.adaptation.amount(self._decision)
        self.finite = tf.constant(True)
        self._generator = self._exchange(step, amount)
        self._resume(None)

    def receive(self, answers: Sequence[tf.Tensor]) -> None:
        gathered = isinstance(self.request, Allgather)
        finite = all_finite(answers)
        self.finite &= finite
        # On this worker as on all others: what is not finite goes on as zeros, to no effect.
        answers = [zeros_unless(finite, answer) if answer.dtype.is_floating else answer for answer in answers]
        answers = [_in_shape_of(part, answer, gathered) for part, answer in zip(self._parts, answers)]
        self._resume(answers if gathered else answers[0])

    def commit(self) -> List[tf.Operation]:
        state, ops = self.state, []
        if state.memory is not None:
            memory = self._delta - tf.reshape(self._sent, state.layout.matrix_shape)
            ops.append(state.memory.assign(memory, read_value=False))
        if state.adaptation is not None:
            ops += state.adaptation.keep(self._decision, self.mean)
        return ops + self._keep()

    def _exchange(self, step: Step, amount: Union[int, tf.Tensor]) -> Generator:
        """Yields requests; returns the mean, and this worker's part of it, which leaves the memory."""
        state = self.state
        finite = self._sends_numbers = all_finite([self._delta])
        self._delta = tf.ensure_shape(zeros_unless(finite, self._delta), state.layout.matrix_shape)
        kept = {key: tf.convert_to_tensor(variable) for key, variable in state.kept.items()}
        key = tf.convert_to_tensor(state.key)
        self._kept = MatrixState(arrays, state.name, state.layout.matrix_shape, key, kept, tf.constant)
        self._kept.begin(step.number, amount, step.worker, step.workers, finite)
        update, sent = yield from state.config.family.exchange(self._delta, self._kept)
        update = marked(update, self.finite)
        self.finite = all_finite([update])
        return update, sent

    def _resume(self, answer) -> None:
        try:
            request = self._generator.send(answer)
        except StopIteration as finished:
            self.request = None
            mean, self._sent = finished.value
            self.mean = tf.reshape(mean, self.state.layout.matrix_shape)
            return
        tensors = request.tensors
        self._parts = [tf.convert_to_tensor(t) for t in (tensors if isinstance(request, Allgather) else [tensors])]
        self.request = type(request)([tf.reshape(self._marked_part(part), [-1]) for part in self._parts])

    def _marked_part(self, part: tf.Tensor) -> tf.Tensor:
        return marked(part, self._sends_numbers) if part.dtype.is_floating else part

    def _keep(self) -> List[tf.Operation]:
        """The ops that keep what this kind of gradient keeps."""
        state = self.state
        ops = [state.kept[key].assign(value, read_value=False) for key, value in self._kept.kept.items()]
        if state.norm is not None:
            norm = tf.sqrt(2 * tf.nn.l2_loss(self._delta))
            ops.append(state.norm.assign(tf.cast(norm, tf.float64), read_value=False))
        return ops


def _in_shape_of(part: tf.Tensor, answer: tf.Tensor, gathered: bool) -> tf.Tensor:
    """What came back for a part, in its shape; with the workers as first axis where it was gathered."""
    shape = part.shape.as_list()
    if shape.count(None) > (0 if gathered else 1):
        shape = [tf.shape(part)[i] if side is None else side for i, side in enumerate(shape)]
    return tf.reshape(answer, [-1 if side is None else side for side in ([None] if gathered else []) + shape])


def all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether there are only numbers in them."""
    finite = [tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors if tensor.dtype.is_floating]
    return tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)
