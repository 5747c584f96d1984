"""What makes and keeps the workers' replicas of a model equal."""

import hashlib
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.tensorflow.functions import allgather_object
from horovod.tensorflow.mpi_ops import broadcast, broadcast_, global_process_set

from horovod_powersgd.agreement import check_replicas
from horovod_powersgd.tensorflow.variable import native

# What both of Horovod's broadcasts take. Other numbers travel as bytes.
_SENT_AS_THEY_ARE = (tf.bool, tf.uint8, tf.int8, tf.int32, tf.int64, tf.float16, tf.float32, tf.float64)


def broadcast_variables(variables, root_rank, process_set=global_process_set, inplace=False) -> Any:
    """Gives all workers the root's variables; as Horovod's, and also Keras 3's variables and numbers of any dtype.

    The n-th variable here meets the n-th variable there, whatever their names are.

    Args:
        variables: of TensorFlow or of Keras 3, each of the same shape and dtype on all workers.
        root_rank: the worker that has the right ones.
        process_set: the workers that take part.
        inplace: whether to do without temporary copies, where executing eagerly, of the dtypes that Horovod knows.

    Returns:
        None when executing eagerly; in a graph, the operation that does it.

    Raises:
        TypeError: a variable holds strings.
    """
    variables = [native(variable) for variable in variables]
    for variable in variables:
        if variable.dtype.base_dtype == tf.string:
            raise TypeError(f"{variable.name} holds strings, which Horovod cannot send")
    # In place, Horovod blocks a thread of TensorFlow: in a graph, workers that come to different operations would hang.
    inplace = inplace and tf.executing_eagerly()
    done = [_broadcast(v, root_rank, f"variable_{i}", process_set, inplace) for i, v in enumerate(variables)]
    return None if tf.executing_eagerly() else tf.group(done)


def _broadcast(variable, root_rank, name, process_set, inplace):
    dtype = variable.dtype.base_dtype
    if dtype not in _SENT_AS_THEY_ARE:
        received = broadcast(tf.bitcast(variable, tf.uint8), root_rank, name, process_set=process_set)
        return variable.assign(tf.bitcast(received, dtype))
    if inplace:
        return broadcast_([variable], root_rank, name, process_set)
    return variable.assign(broadcast(variable, root_rank, name, process_set=process_set))


def optimizer_variables(optimizer):
    """All variables of a Keras optimizer, those included that tf_keras does not list: learning rate and loss scale."""
    listed = optimizer.variables
    variables = list(listed() if callable(listed) else listed)
    scale = getattr(optimizer, "_loss_scale", None)
    unlisted = [getattr(optimizer, "learning_rate", None)]
    unlisted += [getattr(scale, name, None) for name in ("current_loss_scale", "counter")]
    seen = {id(variable) for variable in variables}
    return variables + [v for v in unlisted if isinstance(v, tf.Variable) and id(v) not in seen]


def assert_replicas_equal(model) -> None:
    """Checks that all workers hold the same bits. Costs a hash of the model, and a few bytes.

    Args:
        model: a Keras model, whose weights are compared, trained or not, but for the moving statistics of its
            BatchNormalization layers and what metrics have seen, which are each worker's own by nature; or a list of
            variables or arrays, compared in their order, whatever their names are; or a dict of them, compared by name.

    Raises:
        AssertionError: on every worker, naming the variables that differ, and from which worker on.
    """
    names, arrays = {}, model
    if not isinstance(model, dict):
        arrays = dict(enumerate(_replicated(model) if hasattr(model, "weights") else model))
        names = {i: getattr(v, "path", getattr(v, "name", f"number {i}")) for i, v in arrays.items()}
    mine = {key: _hash(array) for key, array in arrays.items()}
    check_replicas(allgather_object(mine, name="replicas"), names, "variables")


def _replicated(model):
    """The weights of a Keras model that are the same on all workers."""
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, tf.keras.layers.BatchNormalization)]
    own = {id(v) for layer in layers for v in layer.weights if v is not layer.gamma and v is not layer.beta}
    # Keras 2 counts metrics' variables among the weights. Random states are none.
    own |= {id(v) for metric in model.metrics for v in metric.variables}
    return [weight for weight in model.weights if id(weight) not in own]


def _hash(array):
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
