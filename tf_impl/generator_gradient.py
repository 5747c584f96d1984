"""A gradient that travels as its compressor's generator says."""

from collections.abc import Generator, Sequence
from typing import Any

import tensorflow as tf

from horovod_powersgd.compressors.collectives import QuantizedMean
from horovod_powersgd.compressors.matrix_state import MatrixState
from horovod_powersgd.tensorflow import arrays
from horovod_powersgd.tensorflow.compressed_gradient import CompressedGradient
from horovod_powersgd.tensorflow.finite import all_finite, marked, zeros_unless
from horovod_powersgd.tensorflow.gradient import Step
from horovod_powersgd.tensorflow.initial_state import initial_values
from horovod_powersgd.tensorflow.variable import Assignment, make_variable
from horovod_powersgd.tensorflow.variable_state import VariableState


class GeneratorGradient(CompressedGradient):
    """Compressor.exchange of one matrix."""

    @staticmethod
    def prepare(state: VariableState) -> None:
        layout, family = state.layout, state.config.family
        initial = initial_values(family, state.name, layout.matrix, layout.amount, state.dtype)
        state.kept = {key: make_variable(value) for key, value in initial.items()}

    def begin(self, step: Step) -> None:
        self.finite = tf.constant(True)
        super().begin(step)

    def receive(self, answers: Sequence[tf.Tensor]) -> None:
        assert self.finite is not None
        # Of an average in 8 bits, this worker's own part is not the others'.
        finite = all_finite(answers[:1] if isinstance(self.request, QuantizedMean) else answers)
        self.finite &= finite
        # On all workers: zeros let the generator finish, and the step is discarded.
        super().receive([zeros_unless(finite, answer) if answer.dtype.is_floating else answer for answer in answers])

    def _exchange(self, step: Step, amount: int | tf.Tensor) -> Generator[Any, Any, Any]:
        state = self.state
        finite = self._sends_numbers = all_finite([self._delta])
        self._delta = tf.ensure_shape(zeros_unless(finite, self._delta), state.layout.matrix_shape)
        kept = {key: tf.convert_to_tensor(variable) for key, variable in state.kept.items()}
        key = tf.convert_to_tensor(state.key)
        self._kept = MatrixState(arrays, state.name, state.layout.matrix, key, kept, tf.constant)
        self._kept.begin(step.number, amount, step.worker, step.workers, finite)
        update, sent = yield from state.config.family.exchange(self._delta, self._kept)
        update = marked(update, self.finite)
        self.finite = all_finite([update])
        return update, sent

    def _marked_part(self, part: tf.Tensor) -> tf.Tensor:
        return marked(part, self._sends_numbers) if part.dtype.is_floating else part

    def kept(self) -> list[Assignment]:
        state = self.state
        kept = [(state.kept[key], value) for key, value in self._kept.kept.items()]
        found = [(variable, tf.convert_to_tensor(value, variable.dtype)) for variable, value in kept]
        if state.norm is not None:
            norm = tf.sqrt(2 * tf.nn.l2_loss(self._delta))
            found.append((state.norm, tf.cast(norm, tf.float64)))
        return super().kept() + found
