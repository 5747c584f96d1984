"""What one variable's gradient goes through in a step: ops in a graph."""

from typing import Callable, List, Optional, Tuple, Union

import tensorflow as tf

from horovod_powersgd.tensorflow.orthogonalization import orthogonalize
from horovod_powersgd.tensorflow.state import VariableState, plain_name, random_factor
from horovod_powersgd.tensorflow.workers import transportable

# Whether a factor is Q; not known before the graph runs where P and Q alternate.
Flag = Union[bool, tf.Tensor]


class PlainGradient:
    """A gradient that is averaged as it is. A step calls begin, send, receive and update, in this order."""

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

    def begin(self, step: tf.Tensor) -> None:
        """Starts a step; `step` is how many were exchanged before."""

    def send(self) -> tf.Tensor:
        """What the next round averages, flat."""
        return tf.reshape(tf.cast(self._tensor, self.sent_dtype), [-1])

    def receive(self, mean: tf.Tensor) -> None:
        """Takes the average of what was sent."""
        self._mean = tf.reshape(mean, self.state.layout.shape)
        self.finite = tf.reduce_all(tf.math.is_finite(self._mean))

    def update(self, factor: Callable[[tf.DType], tf.Tensor]) -> tf.Tensor:
        """The average, times `factor`."""
        return tf.cast(self._mean * factor(self._mean.dtype), self.state.variable_dtype)

    def commit(self) -> List[tf.Operation]:
        """The ops that keep what the next step needs, where this one is finite."""
        return []


class MatrixGradient(PlainGradient):
    """A gradient that travels as factors: reference.exchange of one tensor."""

    compressed = True

    @property
    def sent_dtype(self) -> tf.DType:
        return tf.float16 if self.state.config.wire_dtype == "float16" else self.state.dtype

    def begin(self, step: tf.Tensor) -> None:
        state = self.state
        self._delta = tf.reshape(tf.cast(self._tensor, state.dtype), state.layout.matrix_shape)
        if state.memory is not None:
            self._delta += state.memory
        self._mean, self._mean_is_q = tf.convert_to_tensor(state.factor), state.factor_is_q
        if isinstance(self._mean_is_q, tf.Variable):
            self._mean_is_q = tf.convert_to_tensor(self._mean_is_q)
        if not state.config.warm_start:
            rank, columns = state.layout.amount, state.layout.matrix_shape[1]
            drawn = tf.numpy_function(random_factor, [state.random_key, columns, rank, step], tf.float64)
            self._mean = tf.cast(tf.transpose(tf.ensure_shape(drawn, (columns, rank))), state.dtype)
            self._mean_is_q = True
        self.finite = tf.constant(True)

    def send(self) -> tf.Tensor:
        """A half-step: delta Q^ or delta^T P^."""
        is_q = self._mean_is_q
        basis = self._basis = orthogonalize(self._mean, tf.convert_to_tensor(self.state.random_key))
        factor = _choose(
            is_q,
            lambda: tf.matmul(basis, self._delta, transpose_b=True),
            lambda: tf.matmul(basis, self._delta),
        )
        # By way of float32, as processors do it.
        self._own = tf.cast(tf.cast(factor, tf.float32), tf.float16) if self.sent_dtype == tf.float16 else factor
        return tf.reshape(self._own, [-1])

    def receive(self, mean: tf.Tensor) -> None:
        mean = tf.cast(tf.reshape(mean, [self.state.layout.amount, -1]), self.state.dtype)
        finite = tf.reduce_all(tf.math.is_finite(mean))
        self.finite &= finite
        # On this worker as on all others: it goes on as zeros, to no effect.
        self._mean = tf.where(finite, mean, tf.zeros_like(mean))
        self._mean_is_q = _not(self._mean_is_q)
        self._mean.set_shape((self.state.layout.amount, self._columns(self._mean_is_q)))

    def update(self, factor: Callable[[tf.DType], tf.Tensor]) -> tf.Tensor:
        """P^ Q^T, times `factor`; not a number where the average is not finite."""
        mean = self._mean * factor(self._mean.dtype)
        mean = tf.where(self.finite, mean, tf.fill(tf.shape(mean), tf.cast(float("nan"), mean.dtype)))
        product = self._product(mean, self._mean_is_q)
        if self.state.memory is not None:
            # Error feedback from this worker's own last factor, which may still be travelling: delta_w - P^ Q_w^T.
            self._memory = self._delta - self._product(tf.cast(self._own, self.state.dtype), self._mean_is_q)
        return tf.cast(tf.reshape(product, self.state.layout.shape), self.state.variable_dtype)

    def commit(self) -> List[tf.Operation]:
        state = self.state
        ops = [state.factor.assign(self._mean, read_value=False)]
        ops.append(state.own.assign(tf.cast(self._own, state.dtype), read_value=False))
        if isinstance(state.factor_is_q, tf.Variable):
            ops.append(state.factor_is_q.assign(self._mean_is_q, read_value=False))
        if state.memory is not None:
            ops.append(state.memory.assign(self._memory, read_value=False))
        return ops

    def _product(self, factor: tf.Tensor, is_q: Flag) -> tf.Tensor:
        """P^ Q^T, or P Q^^T where the last half-step made P."""
        return _choose(
            is_q,
            lambda: tf.matmul(self._basis, factor, transpose_a=True),
            lambda: tf.matmul(factor, self._basis, transpose_a=True),
        )

    def _columns(self, is_q: Flag) -> Optional[int]:
        """Of a factor, transposed."""
        return self.state.layout.matrix_shape[1 if is_q else 0] if isinstance(is_q, bool) else None


def _not(flag: Flag) -> Flag:
    return not flag if isinstance(flag, bool) else tf.logical_not(flag)


def _choose(flag: Flag, yes: Callable[[], tf.Tensor], no: Callable[[], tf.Tensor]) -> tf.Tensor:
    if isinstance(flag, bool):
        return yes() if flag else no()
    return tf.cond(flag, yes, no)
