"""A training as people write it for Horovod, who have never heard of this package."""

import horovod.tensorflow.keras as hvd
import numpy as np
from tensorflow import keras


def train(**options):
    """The trained model. Its optimizer is the distributed one.

    Args:
        options: of DistributedOptimizer.
    """
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(128), keras.layers.Dense(32)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01 * hvd.size(), momentum=0.9), **options)
    model.compile(optimizer=optimizer, loss="mse")
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    inputs, targets = np.random.standard_normal((48, 64)), np.random.standard_normal((48, 32))
    model.fit(inputs, targets, batch_size=16, epochs=1, verbose=0, callbacks=callbacks)
    return model
