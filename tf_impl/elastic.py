"""horovod.tensorflow.elastic for TensorFlow 2, Keras 3 and Keras 2 (tf_keras), executing eagerly.

What compressors keep needs no care: the workers of a new generation agree on it before their first exchange.
"""

import functools
from typing import Any

import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.mpi_ops import rank, shutdown

from horovod_powersgd.tensorflow.replicas import broadcast_variables, optimizer_variables

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]

# What Horovod's operations end with when a worker is gone. A mistake, such as shapes that differ among workers, is a
# FailedPreconditionError: training would only meet it again.
_LOST = (tf.errors.UnknownError, tf.errors.AbortedError, tf.errors.InternalError)


def _recoverable(function):
    """Turns TensorFlow's errors about lost workers into the one from which elastic jobs recover."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except _LOST as error:
            if "Horovod" not in error.message:
                raise
            raise HorovodInternalError(error) from error

    return wrapper


def run(func) -> Any:
    """Decorates a function that trains, so that it goes on when workers are lost or new ones come.

    Args:
        func: takes a state of this module first, and is called again after each change of workers, with the state that
            all workers agree on. Nothing may be exchanged before it is called.
    """
    return run_fn(_recoverable(func), _reset)


def _reset():
    # The package imports this module.
    from horovod_powersgd.tensorflow import init

    shutdown()
    init()


class _VariablesState(ObjectState):
    """Saves and synchronizes the variables that _variables() returns, and attributes."""

    def __init__(self, kwargs) -> None:
        self._save_variables()
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    def save(self) -> None:
        """Remembers variables and attributes as they are."""
        self._save_variables()
        super().save()

    def restore(self) -> None:
        """Sets variables and attributes to what was saved last."""
        for variable, value in zip(self._variables(), self._values):
            variable.assign(value)
        super().restore()

    @_recoverable
    def sync(self) -> None:
        """Gives all workers worker 0's variables and attributes."""
        broadcast_variables(self._variables(), root_rank=0)
        self._save_variables()
        super().sync()

    def _save_variables(self):
        self._values = [tf.identity(variable) for variable in self._variables()]


class TensorFlowState(_VariablesState):
    """The state of a list of variables.

    Args:
        variables: of TensorFlow or of Keras 3.
        session: TensorFlow 1 had one.
        kwargs: attributes of the state, saved and synchronized too.

    Raises:
        ValueError: a session is given.
    """

    def __init__(self, variables=None, session=None, **kwargs) -> None:
        if session is not None:
            raise ValueError("Sessions of TensorFlow 1 are not supported in elastic jobs")
        self.variables = list(variables or ())
        super().__init__(kwargs)

    def _variables(self):
        return self.variables


class TensorFlowKerasState(_VariablesState):
    """The state of a Keras model and its optimizer.

    Args:
        model: it must be built.
        optimizer: model.optimizer if None. It is built if it is not.
        backend: TensorFlow 1 had one.
        kwargs: attributes of the state, saved and synchronized too.

    Raises:
        ValueError: the model is not built.
    """

    def __init__(self, model, optimizer=None, backend=None, **kwargs) -> None:
        if not model.built:
            raise ValueError("The model must be built first: model.build(input_shape)")
        self.model = model
        self.optimizer = optimizer or model.optimizer
        # A worker that comes later must have the variables of those that have trained.
        _build(self.optimizer, model.trainable_variables)
        super().__init__(kwargs)

    def _variables(self):
        # Not model.variables, in which Keras 3 has the random states, too: each worker has its own.
        return [*self.model.weights, *optimizer_variables(self.optimizer)]


def _build(optimizer, variables):
    if hasattr(optimizer, "_create_all_weights"):  # tf.keras.optimizers.legacy
        optimizer._create_all_weights(variables)
    elif not getattr(optimizer, "built", False):
        optimizer.build(variables)
