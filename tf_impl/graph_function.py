"""Functions that the graphs of all variables share."""

from collections.abc import Callable

import tensorflow as tf


def graph_function(function: Callable, inlined: bool = False) -> Callable:
    """Makes ops that many variables need a function in the graph, which holds only the calls then: a graph with a
    function's ops for each variable takes long to build. It is built anew only for other dtypes.

    Args:
        function: of tensors, and of what is equal for all callers.
        inlined: whether TensorFlow may put the ops in the calls' place when it rewrites the graph: of large tensors
            they take less then, but the rewriting takes longer.
    """
    attributes = None if inlined else {"_noinline": True}
    return tf.function(function, autograph=False, reduce_retracing=True, experimental_attributes=attributes)
