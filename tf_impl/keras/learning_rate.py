"""The learning rate of a Keras optimizer in the step that comes."""

import tensorflow as tf


def current_learning_rate(optimizer):
    """A number, a tensor or a variable; None where the optimizer has none.

    Args:
        optimizer: of Keras 3 or Keras 2, tf.keras.optimizers.legacy included.
    """
    if hasattr(optimizer, "_decayed_lr"):  # tf.keras.optimizers.legacy
        return optimizer._decayed_lr(tf.float32)
    rate = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, tf.keras.optimizers.schedules.LearningRateSchedule):
        # Keras 2's attribute would be what it was in the last step.
        return rate(optimizer.iterations)
    return rate() if callable(rate) and not hasattr(rate, "assign") else rate
