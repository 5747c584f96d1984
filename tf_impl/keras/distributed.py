"""The methods of all distributed Keras optimizers, and how an optimizer is given them."""

from typing import Any

import tensorflow as tf

from horovod_powersgd.tensorflow.keras.aggregation import Aggregation
from horovod_powersgd.tensorflow.keras.compressing import CompressingMethods
from horovod_powersgd.tensorflow.keras.learning_rate import current_learning_rate

# An object's real class, whatever a property of that name says.
_CLASS = vars(object)["__class__"]
# What comes after the mixins in the method resolution order is known when an optimizer is wrapped.
_Wrapped: Any = object


class DistributedMethods(_Wrapped):
    """A mixin: in the method resolution order it comes before the class of the optimizer that is made distributed.

    Attributes:
        _wrapped: that class.
        _aggregation: the optimizer's own.
    """

    _wrapped: Any
    _aggregation: Aggregation

    @property
    def _agg_helper(self):
        """Horovod's name of what counts backward passes."""
        return self._aggregation if self._aggregation.passes > 1 else None

    @classmethod
    def from_config(cls, config, *args, **kwargs):
        """A plain optimizer, as saved models have it."""
        return cls._wrapped.from_config(config, *args, **kwargs)

    def register_local_var(self, var) -> None:
        """The variable's gradient stays this worker's own."""
        self._aggregation.local.add(var)

    def _allreduce(self, grads, vars):
        self._aggregation.exchanged = True
        return self._aggregate(grads, vars)

    def _aggregate(self, gradients, variables):
        return self._aggregation(gradients, variables, lambda: current_learning_rate(self))

    def _clip_gradients(self, grads):
        clipped = super()._clip_gradients(grads)
        if clipped is not grads:
            self._aggregation.follow_clipping(grads, clipped)
        return clipped

    def compute_gradients(self, loss, var_list, tape=None):
        """The averaged gradients, with their variables.

        Args:
            loss: a tensor computed under `tape`, or a function that computes it.
            var_list: variables.
            tape: where loss is a tensor.
        """
        if callable(loss):
            with tf.GradientTape() as tape:
                loss = loss()
        variables = list(var_list)
        return list(zip(self._allreduce(tape.gradient(loss, variables), variables), variables))

    def _compute_gradients(self, loss, var_list, grad_loss=None, tape=None):
        return self.compute_gradients(loss, var_list, tape)


def distribute(optimizer, aggregation: Aggregation, methods: type[DistributedMethods]):
    """Makes an optimizer a distributed one, of which all else stays: its state, its attributes, its configuration.

    Args:
        optimizer: of Keras 3 or Keras 2.
        aggregation: its own.
        methods: that exchange, of that Keras.

    Raises:
        TypeError: the optimizer itself, not its class, has a method that has to exchange.
    """
    wrapped = optimizer.__class__
    bases: tuple = (methods, wrapped)
    if aggregation.reduction.compressor is not None:
        bases = (CompressingMethods, *bases)
    hiding = sorted(vars(optimizer).keys() & (vars(DistributedMethods).keys() | vars(methods).keys()))
    if hiding:
        names = " and ".join(hiding)
        raise TypeError(
            f"{names} of this {wrapped.__name__} was set on the object, and would be called in place of the one that "
            f"exchanges gradients. Define {names} in a subclass of {wrapped.__name__}."
        )
    members = {
        "_wrapped": wrapped,
        # Keras writes the class that an optimizer says it has into saved models: there it is the wrapped one.
        "__class__": property(lambda self: wrapped),
        # As Horovod's.
        "__module__": "horovod._keras",
        "__doc__": wrapped.__doc__,
    }
    # Keras tracks what is assigned to an optimizer, and would save it.
    object.__setattr__(optimizer, "_aggregation", aggregation)
    _CLASS.__set__(optimizer, type(wrapped.__name__, bases, members))
    return optimizer
