"""Functions that the graphs of all variables share."""

from collections.abc import Callable

import tensorflow as tf


def graph_function(function: Callable) -> Callable:
    """Makes ops that many variables need a function in the graph, which holds only the calls then: a graph with a
    function's ops for each variable takes long to build. It is built anew only for other dtypes, and not inlined.

    Args:
        function: of tensors, and of what is equal for all callers.
    """
    return tf.function(
        function, autograph=False, reduce_retracing=True, experimental_attributes={"_noinline": True}
    )


@graph_function
def zeros_unless(condition: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """The tensor where the condition holds, else as many zeros."""
    return tf.cond(condition, lambda: tensor, lambda: tf.zeros_like(tensor))


def marked(tensor: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
    """The tensor; NaN where `finite`, a boolean, is false."""
    found = _marked(tensor, finite)
    found.set_shape(tensor.shape)
    return found


@graph_function
def _marked(tensor, finite):
    # Where all is well no NaN is computed, nor constant: tf.debugging.enable_check_numerics would tell of it.
    return tf.cond(finite, lambda: tensor, lambda: tensor + tf.math.log(tf.cast(finite, tensor.dtype) - 1))
