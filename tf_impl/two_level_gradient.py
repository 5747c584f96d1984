"""A gradient that travels as PowerSGD's factors from host to host, and whole inside a host."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from horovod_powersgd.tensorflow.gradient import Step
from horovod_powersgd.tensorflow.host_mean import HostMean
from horovod_powersgd.tensorflow.powersgd_gradient import Flag, PowerSGDGradient, choose, p_and_q
from horovod_powersgd.tensorflow.variable import Assignment, make_variable
from horovod_powersgd.tensorflow.variable_state import VariableState, of_all_rows


class TwoLevelGradient(PowerSGDGradient):
    """A PowerSGDGradient in an exchange that may have two levels (horovod_powersgd.hosts).

    Delta and the memory are this worker's share of the rows, of the mean of its host's workers. In an exchange of one
    level that is all rows, of its own gradient. A memory that is from another division of the rows goes into the
    gradient of the first step after.
    """

    @staticmethod
    def prepare(state: VariableState) -> None:
        PowerSGDGradient.prepare(state)
        if state.config.keeps_memory:
            rows, columns = state.layout.matrix
            state.memory = make_variable(np.zeros((0, columns), state.memory_dtype.as_numpy_dtype), (None, columns))
            # Of rows that are divided among more than they are, the first part has none.
            state.memory_share = make_variable(np.array([0, rows + 1]))

    def begin(self, step: Step) -> None:
        assert step.host is not None
        self._share = step.host.share
        self._place, self._rows = self._share.rows(self.state.layout.matrix[0])
        if self.state.memory_share is not None:
            self._goes_on = tf.reduce_all(tf.equal(self.state.memory_share, tf.stack(self._share)))
        super().begin(step)

    def receive(self, answers: Sequence[tf.Tensor]) -> None:
        if isinstance(self.request, HostMean):
            # What is not finite is so on this host only: the factors tell all workers of it.
            self._resume(answers[0])
        else:
            super().receive(answers)

    def kept(self) -> list[Assignment]:
        share = self.state.memory_share
        return super().kept() + ([] if share is None else [(share, tf.stack(self._share))])

    def _with_memory(self, gradient: tf.Tensor) -> tf.Tensor:
        """What the host's workers average."""
        share = self.state.memory_share
        if share is None:
            return gradient

        def with_all_rows():
            return gradient + of_all_rows(self.state.remembered(), tf.unstack(share, 2), gradient.shape[0])

        return tf.cond(self._goes_on, lambda: gradient, with_all_rows)

    def _exchange(self, step: Step, amount: int | tf.Tensor) -> Generator[Any, Any, Any]:
        columns, memory = self.state.layout.matrix[1], self.state.memory
        mean = yield HostMean(self._delta, columns)
        self._delta = tf.reshape(mean, [-1, columns])
        if memory is not None:
            rows = self._delta
            self._delta = tf.cond(self._goes_on, lambda: rows + self.state.remembered(), lambda: rows)
        yield from self._half_steps(step, amount)
        if memory is None:
            return self._update(), None
        # Error feedback from the host's own last factor, which in 8 bits it is already.
        own = (yield from self._of_host(self._own)) if self.state.config.linear else self._own
        if self.state.memory_dtype != self.state.dtype:
            assert step.host is not None
            of_rows, of_columns = self._draw(step, step.host.number)
            self._drawn = of_rows[self._place : self._place + self._rows], of_columns
        p, q = p_and_q(self._basis, own, self._factor_is_q)
        self._sent_factors = self._own_rows(p), q
        return self._update(), tf.matmul(*self._sent_factors, transpose_a=True)

    def _multiply(self, basis: tf.Tensor, is_q: Flag) -> tf.Tensor:
        def make_p():
            after = self.state.layout.matrix[0] - self._place - self._rows
            return tf.pad(tf.matmul(basis, self._delta, transpose_b=True), [[0, 0], [self._place, after]])

        return choose(is_q, make_p, lambda: tf.matmul(self._own_rows(basis), self._delta))

    def _of_host(self, own: tf.Tensor) -> Generator[Any, Any, tf.Tensor]:
        mean = yield HostMean(own)
        return self._over_hosts(tf.reshape(mean, tf.shape(own)))

    def _over_hosts(self, mean: tf.Tensor) -> tf.Tensor:
        # A host's factor is the sum over its workers.
        return mean * tf.cast(self._share.parts, mean.dtype)

    def _own_rows(self, factor: tf.Tensor) -> tf.Tensor:
        """What a factor, kept transposed, has for this worker's rows of the matrix."""
        return factor[:, self._place : self._place + self._rows]

    def _norm_of_sent(self) -> tf.Tensor:
        p, q = (tf.cast(factor, tf.float64) for factor in self._sent_factors)
        squared = tf.reduce_sum(tf.matmul(p, p, transpose_b=True) * tf.matmul(q, q, transpose_b=True))
        return tf.sqrt(tf.maximum(squared, 0))
