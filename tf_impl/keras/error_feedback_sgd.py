"""The update of the PowerSGD paper's Algorithm 2."""

import tensorflow as tf

from horovod_powersgd.tensorflow.keras_version import KERAS_3


@tf.keras.utils.register_keras_serializable(package="horovod_powersgd")
class ErrorFeedbackSGD(tf.keras.optimizers.Optimizer):
    """SGD with momentum as in the PowerSGD paper's Algorithm 2, lines 12 and 13, where it comes after the exchange:

        m = momentum * m + gradient
        x = x - learning_rate * (gradient + m)

    Wrap it in hvd.DistributedOptimizer, whose exchange is lines 7 to 11. The first step moves 2 learning_rate times the
    gradient, and a constant gradient in the end learning_rate (1 + 1 / (1 - momentum)) times it: Keras's SGD with
    nesterov=True multiplies m by the momentum once more, and moves learning_rate / (1 - momentum).

    Args:
        learning_rate: a number or a schedule.
        momentum: at least 0 and below 1.
        name: of the optimizer.
        kwargs: of the Keras optimizers: weight_decay, clipnorm and so on.

    Raises:
        ValueError: momentum is outside what is allowed.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(hvd.ErrorFeedbackSGD(0.05), compression=hvd.PowerSGD(rank=4))
        >>> model.compile(optimizer=optimizer, loss=...)
    """

    def __init__(self, learning_rate=0.001, momentum=0.9, name="ErrorFeedbackSGD", **kwargs) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"ErrorFeedbackSGD: momentum must be at least 0 and below 1, not {momentum!r}")
        if KERAS_3:
            super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        else:
            super().__init__(name=name, **kwargs)
            self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum = momentum

    def build(self, variables):
        """Makes the momentum of each variable."""
        super().build(variables)
        if not hasattr(self, "_momentums"):
            if KERAS_3:
                self._momentums = self.add_optimizer_variables(variables, "momentum")
            else:
                self._momentums = [self.add_variable_from_reference(variable, "momentum") for variable in variables]
                self._built = True

    def update_step(self, gradient, variable, learning_rate=None):
        """Changes one variable."""
        place = self._get_variable_index(variable) if KERAS_3 else self._index_dict[self._var_key(variable)]
        m = self._momentums[place]
        rate = tf.cast(self.learning_rate if learning_rate is None else learning_rate, variable.dtype)
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        m.assign(tf.cast(self.momentum, variable.dtype) * m + gradient)
        variable.assign_sub(rate * (gradient + m))

    def get_config(self):
        """What from_config makes an equal one of."""
        config = {**super().get_config(), "momentum": self.momentum}
        if not KERAS_3:
            config["learning_rate"] = self._serialize_hyperparameter(self._learning_rate)
        return config
