"""A gradient that travels as PowerSGD's factors: the fast twin of PowerSGD.exchange."""

import functools
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.compressors.collectives import AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.powersgd import PowerSGD, scale_of_halves
from horovod_powersgd.factors import initial_factor
from horovod_powersgd.randomness import SPARE, random_factor
from horovod_powersgd.tensorflow import arrays, orthogonalization
from horovod_powersgd.tensorflow.compressed_gradient import CompressedGradient
from horovod_powersgd.tensorflow.finite import all_finite
from horovod_powersgd.tensorflow.gradient import Step
from horovod_powersgd.tensorflow.graph_function import graph_function
from horovod_powersgd.tensorflow.half_memory import drawn, rounded
from horovod_powersgd.tensorflow.variable import Assignment, make_variable
from horovod_powersgd.tensorflow.variable_state import VariableState

# Whether a factor is Q; not known before the graph runs where P and Q alternate.
Flag: TypeAlias = bool | tf.Tensor


class PowerSGDGradient(CompressedGradient):
    """PowerSGD.exchange of one matrix. Factors are kept transposed."""

    @staticmethod
    def prepare(state: VariableState) -> None:
        rank, columns = state.layout.amount, state.layout.matrix[1]
        alternates = _powersgd(state).alternates
        shape = None if isinstance(state.config, Accordion) else rank, None if alternates else columns
        starting = initial_factor(state.name, columns, rank, state.config.seed).T
        state.factor = make_variable(np.ascontiguousarray(starting, state.dtype.as_numpy_dtype), shape)
        state.factor_is_q = make_variable(np.bool_(True)) if alternates else True

    @property
    def sent_dtype(self) -> tf.DType:
        return tf.float16 if _powersgd(self.state).wire_dtype == "float16" else self.state.dtype

    def _rounded(self, memory: tf.Tensor) -> tf.Tensor:
        dtype = _powersgd(self.state).memory_dtype
        return memory if dtype is None else rounded(memory, *self._drawn, dtype)

    def _draw(self, step: Step, worker: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """What decides how the memory of this step is rounded, for rows and columns."""
        sides = (tf.constant(side, tf.int64) for side in self.state.layout.matrix)
        return drawn(tf.convert_to_tensor(self.state.key), step.number, worker, *sides)

    def _exchange(self, step: Step, amount: int | tf.Tensor) -> Generator[Any, Any, Any]:
        yield from self._half_steps(step, amount)
        if self.state.memory is not None and self.state.memory_dtype != self.state.dtype:
            self._drawn = self._draw(step, step.worker)
        # Error feedback from this worker's own last factor: delta_w - P^ Q_w^T.
        return self._update(), _product(self._basis, self._own, self._factor_is_q)

    def _half_steps(self, step: Step, amount: int | tf.Tensor) -> Generator[Any, Any, None]:
        """Yields a request for each."""
        state, config, key = self.state, _powersgd(self.state), tf.convert_to_tensor(self.state.key)
        # delta is finite where the small factor is that comes of it.
        factor, is_q = tf.convert_to_tensor(state.factor), state.factor_is_q
        last = factor
        if isinstance(is_q, tf.Variable):
            is_q = tf.convert_to_tensor(is_q)
        if step.renews or not config.warm_start:
            columns = state.layout.matrix[1]
            factor, is_q = self._random(key, columns, amount, step.number), True
        elif state.accordion is not None:
            found = _resized(factor, amount, key)
            found.set_shape(factor.shape)
            factor = found
        for _ in range(config.half_steps(step.renews)):
            basis = _basis(factor, key)
            own = self._multiply(basis, is_q)
            is_q = _not(is_q)
            shape = [amount, self._columns(is_q)]
            if config.wire_dtype == "int8":
                own = yield from self._of_host(own)
                factor, own = yield QuantizedMean(tf.reshape(own, shape))
            elif step.sends_halves:
                longer = tf.cast(tf.shape(last)[1] / tf.shape(own)[1], state.dtype)
                scale = scale_of_halves(arrays, last, longer)
                sent = arrays.cast(own * scale, "float16")
                mean = yield AllreduceMean(tf.reshape(sent, [-1]))
                factor = self._over_hosts(tf.cast(tf.reshape(mean, shape), state.dtype) / scale)
                own = tf.cast(sent, state.dtype) / scale
            else:
                mean = yield AllreduceMean(tf.reshape(own, [-1]))
                factor = self._over_hosts(tf.reshape(mean, shape))
            last = factor
        self._basis, self._factor, self._factor_is_q, self._own = basis, factor, is_q, own

    def _multiply(self, basis: tf.Tensor, is_q: Flag) -> tf.Tensor:
        """A half-step: (r, n) from a basis of Q, or (r, m)."""
        return choose(
            is_q,
            lambda: tf.matmul(basis, self._delta, transpose_b=True),
            lambda: tf.matmul(basis, self._delta),
        )

    def _of_host(self, own: tf.Tensor) -> Generator[Any, Any, tf.Tensor]:
        """Yields requests; returns the host's factor, from what this worker has made of it."""
        yield from ()
        return own

    def _over_hosts(self, mean: tf.Tensor) -> tf.Tensor:
        """The mean of factors over the hosts, from that over the workers."""
        return mean

    def _update(self) -> tf.Tensor:
        return _product(self._basis, self._factor, self._factor_is_q)

    def _marked_part(self, part: tf.Tensor) -> tf.Tensor:
        return part  # a factor is not finite where delta is not

    def kept(self) -> list[Assignment]:
        state = self.state
        assert state.factor is not None
        found = [*super().kept(), (state.factor, self._factor)]
        if isinstance(state.factor_is_q, tf.Variable):
            found.append((state.factor_is_q, tf.convert_to_tensor(self._factor_is_q)))
        if state.norm is not None:
            found.append((state.norm, self._norm_of_sent()))
        return found

    def _norm_of_sent(self) -> tf.Tensor:
        """VariableState.norm."""
        return tf.sqrt(2 * tf.nn.l2_loss(tf.cast(self._own, tf.float64)))

    def _random(self, key: tf.Tensor, columns, rank, step) -> tf.Tensor:
        drawn = random_factor(arrays, key, step, columns, rank)
        drawn.set_shape((columns if isinstance(columns, int) else None, rank if isinstance(rank, int) else None))
        return tf.cast(tf.transpose(drawn), self.state.dtype)

    def _columns(self, is_q: Flag) -> int:
        """Of a factor, transposed; -1 where that is not known."""
        return self.state.layout.matrix[1 if is_q else 0] if isinstance(is_q, bool) else -1


def _powersgd(state: VariableState) -> PowerSGD:
    family = state.config.family
    assert isinstance(family, PowerSGD)
    return family


def _basis(factor: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """factors.orthogonalize of a factor (r, n), transposed. The key chooses the spare columns."""
    basis = _orthonormal(factor, key)
    basis.set_shape(factor.shape)
    return basis


@graph_function
def _orthonormal(factor: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    rank, length = tf.unstack(tf.shape(factor))
    spare = functools.partial(random_factor, arrays, key, SPARE, length, rank)

    def orthonormal():
        return tf.transpose(orthogonalization.orthogonalize(tf.transpose(factor), spare))

    # What is not finite stays so in all that comes of it, on every worker, and the step is discarded.
    return tf.cond(all_finite([factor]), orthonormal, lambda: factor)


@graph_function
def _resized(factor: tf.Tensor, rank: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """factors.resized of a transposed factor, where it has another rank."""
    old, length = tf.unstack(tf.shape(factor, tf.int64))

    def shrunk():
        wide = tf.cast(factor, tf.float64)
        directions = tf.linalg.eigh(tf.matmul(wide, wide, transpose_b=True))[1][:, old - rank :]
        return tf.cast(tf.matmul(directions, wide, transpose_a=True), factor.dtype)

    def grown():
        wide = tf.cast(factor, tf.float64)
        added = tf.transpose(random_factor(arrays, key, SPARE, length, rank))[old:]
        mean = tf.norm(wide) / tf.sqrt(tf.cast(old, tf.float64))
        scale = tf.where(mean > 0, mean / tf.norm(added, axis=1, keepdims=True), tf.ones_like(mean))
        return tf.cast(tf.concat([wide, scale * added], 0), factor.dtype)

    return tf.cond(tf.equal(rank, old), lambda: factor, lambda: tf.cond(rank < old, shrunk, grown))


def _product(basis: tf.Tensor, factor: tf.Tensor, is_q: Flag) -> tf.Tensor:
    """P^ Q^T, or P Q^^T where the last half-step made P."""
    return tf.matmul(*p_and_q(basis, factor, is_q), transpose_a=True)


def p_and_q(basis: tf.Tensor, factor: tf.Tensor, is_q: Flag) -> tuple[tf.Tensor, tf.Tensor]:
    """The last half-step's factors, both transposed, of which the basis is one."""
    return choose(is_q, lambda: (basis, factor), lambda: (factor, basis))


def _not(flag: Flag) -> Flag:
    return not flag if isinstance(flag, bool) else tf.logical_not(flag)


def choose(flag: Flag, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """What the one function gives, or the other."""
    if isinstance(flag, bool):
        return yes() if flag else no()
    return tf.cond(flag, yes, no)
