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
