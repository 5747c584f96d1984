"""What compressed gradients have in common: delta, the generator that exchanges it, and the memory."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import tensorflow as tf

from horovod_powersgd.compressors.collectives import Allgather, QuantizedMean
from horovod_powersgd.quantization import rows_of
from horovod_powersgd.tensorflow.gradient import PlainGradient, Step, shaped
from horovod_powersgd.tensorflow.variable import Assignment
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Number


class CompressedGradient(PlainGradient):
    """A gradient that travels compressed: reference.exchange of one matrix, with its memory and Accordion."""

    compressed = True

    @property
    def sent_dtype(self) -> tf.DType:
        return self.state.dtype

    def begin(self, step: Step) -> None:
        state, amount = self.state, self.state.layout.amount
        self._delta = self._with_memory(shaped(tf.cast(self._tensor, state.dtype), state.layout.matrix))
        if state.accordion is not None:
            self._decision = state.accordion.decide(step.number, step.learning_rate)
            amount = state.accordion.amount(self._decision)
        self._generator = self._exchange(step, amount)
        self._resume(None)

    def receive(self, answers: Sequence[tf.Tensor]) -> None:
        gathered, quantized = isinstance(self.request, Allgather), isinstance(self.request, QuantizedMean)
        parts = self._parts * 2 if quantized else self._parts
        answers = [_in_shape_of(part, answer, gathered) for part, answer in zip(parts, answers)]
        self._resume(answers if gathered or quantized else answers[0])

    def kept(self) -> list[Assignment]:
        state, found = self.state, []
        if state.memory is not None:
            memory = self._delta - shaped(self._sent, (-1, state.layout.matrix[1]))
            found += state.remembering(self._rounded(memory))
        if state.accordion is not None:
            found += state.accordion.kept(self._decision, self.mean)
        return found

    @staticmethod
    def prepare(state: VariableState) -> None:
        """Makes the variables that this kind of gradient keeps."""
        raise NotImplementedError

    def _with_memory(self, gradient: tf.Tensor) -> tf.Tensor:
        """Delta."""
        return gradient if self.state.memory is None else gradient + self.state.remembered()

    def _rounded(self, memory: tf.Tensor) -> tf.Tensor:
        """The memory as it is to be kept."""
        return memory

    def _exchange(self, step: Step, amount: int | tf.Tensor) -> Generator[Any, Any, Any]:
        """Yields requests; returns the mean, and this worker's part of it, which leaves the memory."""
        raise NotImplementedError

    def _marked_part(self, part: tf.Tensor) -> tf.Tensor:
        """What is sent of a part: floats are not finite where this worker's delta is not finite."""
        raise NotImplementedError

    def _resume(self, answer) -> None:
        try:
            request = self._generator.send(answer)
        except StopIteration as finished:
            self.request = None
            mean, self._sent = finished.value
            self.mean = shaped(mean, self.state.layout.matrix)
            return
        tensors = request.tensors
        self._parts = [tf.convert_to_tensor(t) for t in (tensors if isinstance(request, Allgather) else [tensors])]
        flat = [shaped(self._marked_part(part), (-1,)) for part in self._parts]
        self.request = dataclasses.replace(request, tensors=flat)

    @property
    def rows(self) -> list[tuple[Number, Number]]:
        """quantization.rows_of what is asked to be averaged in 8 bits."""
        (part,) = self._parts
        known, found = part.shape.as_list(), tf.shape(part, tf.int64)
        assert isinstance(self.request, QuantizedMean)
        return rows_of([found[axis] if side is None else side for axis, side in enumerate(known)], self.request.row)


def _in_shape_of(part: tf.Tensor, answer: tf.Tensor, gathered: bool) -> tf.Tensor:
    """What came back for a part, in its shape; with the workers as first axis where it was gathered."""
    shape = part.shape.as_list()
    if shape.count(None) > (0 if gathered else 1):
        shape = [tf.shape(part)[i] if side is None else side for i, side in enumerate(shape)]
    return shaped(answer, [-1 if side is None else side for side in ([None] if gathered else []) + shape])
