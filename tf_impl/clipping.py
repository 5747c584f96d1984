"""What becomes of the memory where an averaged gradient is clipped: horovod_powersgd.clipping, in ops."""

from collections.abc import Sequence

import tensorflow as tf

from horovod_powersgd.clipping import SPIKE
from horovod_powersgd.tensorflow.finite import all_finite, marked
from horovod_powersgd.tensorflow.graph_function import graph_function
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.variable_state import VariableState


@graph_function
def after_clipping(factor: tf.Tensor, usual: tf.Tensor):
    """horovod_powersgd.clipping.after_clipping, of float64 scalars; `usual` is 0 where nothing is."""
    one, known = tf.ones_like(factor), usual > 0
    ratio = factor / tf.where(known, usual, one)
    of_memory = tf.where(known & (ratio * SPIKE < 1), ratio, one)
    return of_memory, tf.where(known, usual * tf.sqrt(tf.clip_by_value(ratio, 1 / SPIKE, SPIKE)), factor)


def clip_memory(state: VariableState, factor: tf.Tensor, snapshot: Snapshot | None) -> None:
    """Clips what the last step left in the memory, as its update is; adds ops to a graph.

    Where the memory before the step is still there, it comes back in the place of what is cut off.

    Args:
        state: of the variable.
        factor: what the update is multiplied by, float64, 0 or more. Where it is not finite the step is none.
        snapshot: has the memory before the step; None where nobody kept it.
    """
    assert state.memory is not None and state.usual_clipping is not None
    usual_clipping = state.usual_clipping
    comparable = tf.constant(True)
    if snapshot is not None and state.memory_share is not None:
        # A memory before of another division of the rows is in the last step's gradient.
        comparable = tf.reduce_all(tf.equal(state.memory_share, snapshot.copy_of(state.memory_share)))

    def clip():
        of_memory, usual = after_clipping(factor, tf.convert_to_tensor(usual_clipping))
        usual_clipping.assign(usual)

        def cut():
            part = tf.cast(of_memory, state.dtype)
            memory = part * state.remembered()
            state.remember(memory if snapshot is None else memory + (1 - part) * state.remembered(snapshot))
            return True

        return tf.cond((of_memory < 1) & comparable, cut, lambda: False)

    tf.cond(tf.math.is_finite(factor), clip, lambda: False)


def clipping_factors(gradients: Sequence, clipped: Sequence) -> list[tf.Tensor]:
    """By what each gradient was made shorter, float64; NaN where it is not finite.

    Args:
        gradients: tf.Tensor, tf.IndexedSlices or None.
        clipped: the same after clipping.
    """
    pairs = zip(gradients, clipped)
    return [tf.constant(1, tf.float64) if g is None else _ratio(_values(c), _values(g)) for g, c in pairs]


@graph_function
def _ratio(clipped: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    short, long = _length(clipped), _length(gradient)
    ratio = tf.where(long > 0, short / tf.where(long > 0, long, tf.ones_like(long)), tf.ones_like(long))
    return marked(ratio, all_finite([gradient]))


def _values(gradient) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _length(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.norm(tf.cast(values, tf.float64 if values.dtype == tf.float64 else tf.float32)), tf.float64)
