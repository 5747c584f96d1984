"""Which optimizers can be made distributed ones."""

import inspect

import tensorflow as tf

from horovod_powersgd.tensorflow.keras_version import KERAS_3

# The package that tf.keras is, and the other one.
_PACKAGE = tf.keras.optimizers.Optimizer.__module__.partition(".")[0]
_OTHER = "tf_keras" if KERAS_3 else "keras"


def check_optimizer(optimizer) -> None:
    """Checks that an optimizer can be made a distributed one.

    Raises:
        TypeError: it is none of tf.keras. The message says what it is, and what to give instead.
    """
    # In TensorFlow 2, tf.keras has two kinds.
    legacy = () if KERAS_3 else (tf.keras.optimizers.legacy.Optimizer,)
    if isinstance(optimizer, (tf.keras.optimizers.Optimizer, *legacy)):
        return
    if isinstance(optimizer, str):
        found = f"the name {optimizer!r}: tf.keras.optimizers.get({optimizer!r}) makes one"
    elif inspect.isclass(optimizer):
        found = f"the class {optimizer.__name__}: {optimizer.__name__}(...) makes one"
    elif isinstance(optimizer, tf.compat.v1.train.Optimizer):
        found = "one of TensorFlow 1, which horovod_powersgd.tensorflow.DistributedOptimizer takes"
    elif any(cls.__module__.partition(".")[0] == _OTHER for cls in type(optimizer).__mro__):
        found = (
            f"{type(optimizer).__name__} of the package {_OTHER} (Keras {2 if KERAS_3 else 3}): tf.keras is {_PACKAGE} "
            f"(Keras {3 if KERAS_3 else 2}) here. Take model and optimizer from tf.keras, or "
            + ("set TF_USE_LEGACY_KERAS=1" if KERAS_3 else "leave TF_USE_LEGACY_KERAS=1 out")
            + " before TensorFlow is imported"
        )
    else:
        found = f"{optimizer!r}"
    raise TypeError(f"DistributedOptimizer takes an optimizer of tf.keras, not {found}.")
