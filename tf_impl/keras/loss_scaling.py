"""Loss scaling around a distributed optimizer.

Keras's LossScaleOptimizer asks whether the gradients are finite before it calls the optimizer inside, and calls that
only if they are. Workers that look at their own gradients come to different answers: so the gradients are averaged
before. As Keras puts a LossScaleOptimizer around the optimizers of models in mixed precision by itself, its class is
what has to know.
"""

import functools
import sys

import tensorflow as tf

from horovod_powersgd.tensorflow.keras.learning_rate import current_learning_rate
from horovod_powersgd.tensorflow.keras_version import KERAS_3
from horovod_powersgd.tensorflow.reduction import scaled, unscaled


def aggregation_inside(optimizer):
    """The Aggregation of the distributed optimizer inside a LossScaleOptimizer; None where there is none."""
    return getattr(getattr(optimizer, "inner_optimizer", None), "_aggregation", None)


def expose_inner(loss_scale_optimizer):
    """Gives it what users ask the distributed optimizer inside for."""
    inner = loss_scale_optimizer.inner_optimizer
    for name in ("compression_stats", "compression_state_dict", "load_compression_state_dict", "register_local_var"):
        if hasattr(inner, name):
            object.__setattr__(loss_scale_optimizer, name, getattr(inner, name))
    return loss_scale_optimizer


def average_before_apply(cls) -> None:
    """Lets Keras 3's LossScaleOptimizer average first, without the scale: so the memory is right in the next one."""
    original = cls.apply

    @functools.wraps(original)
    def apply(self, grads, trainable_variables=None):
        aggregation = aggregation_inside(self)
        if aggregation is None:
            return original(self, grads, trainable_variables)
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if not self.built:
            self.build(variables)
            self.built = True
        scale = self.dynamic_scale.value
        rate = functools.partial(current_learning_rate, self.inner_optimizer)
        gradients = scaled(aggregation(unscaled(grads, scale), variables, rate), scale)
        aggregation.apply(lambda: original(self, gradients, variables), self.inner_optimizer._iterations)

    cls.apply = tf.autograph.experimental.do_not_convert(apply)


def average_after_unscaling(cls) -> None:
    """Lets Keras 2's LossScaleOptimizer compute gradients without averaging them; it does so when it applies them."""
    for name in ("compute_gradients", "_compute_gradients", "get_gradients"):
        if name in vars(cls):
            setattr(cls, name, _without_averaging(vars(cls)[name]))


def _without_averaging(original):
    @functools.wraps(original)
    def compute(self, *args, **kwargs):
        aggregation = aggregation_inside(self)
        if aggregation is None:
            return original(self, *args, **kwargs)
        aggregation.inside_loss_scaling = True
        try:
            return original(self, *args, **kwargs)
        finally:
            aggregation.inside_loss_scaling = False

    return compute


def loss_scale_optimizers() -> tuple:
    """Keras's classes: one in Keras 3, two in Keras 2."""
    if KERAS_3:
        return (tf.keras.optimizers.LossScaleOptimizer,)
    module = sys.modules[tf.keras.mixed_precision.LossScaleOptimizer.__module__]
    return module.LossScaleOptimizer, module.LossScaleOptimizerV3
