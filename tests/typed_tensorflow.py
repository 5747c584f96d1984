"""What users write, in TensorFlow and Keras: checked by mypy --strict (make lint), not run."""

from collections.abc import Generator
from typing import Any

import horovod_powersgd.keras as hvd_standalone
import horovod_powersgd.tensorflow as hvd
import horovod_powersgd.tensorflow.keras as hvd_keras
from horovod_powersgd import AllreduceMean
from horovod_powersgd.tensorflow.keras.callbacks import BroadcastGlobalVariablesCallback


def everything(delta: Any, state: Any) -> Generator[AllreduceMean, Any, tuple[Any, Any]]:
    mean = yield AllreduceMean(delta)
    return mean, delta


def train(model: Any, optimizer: Any, recorded: Any, loss: Any) -> None:
    hvd.init()
    tape = hvd.DistributedGradientTape(recorded, compression=hvd.PowerSGD(rank=4), op=hvd.Average)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    hvd.broadcast_variables(model.variables, root_rank=0)
    stats: hvd.CompressionStats = tape.compression_stats()
    print(hvd.rank(), hvd.size(), stats.ratio, hvd.allreduce(loss, op=hvd.Sum), hvd.Compression.fp16, hvd.join())
    hvd.assert_replicas_equal(model)


def fit(model: Any, optimizer: Any, data: Any) -> None:
    hvd_keras.init()
    distributed = hvd_keras.DistributedOptimizer(optimizer, compression=hvd_keras.Custom(everything))
    model.compile(optimizer=distributed, loss="mse")
    broadcast = BroadcastGlobalVariablesCallback(0)
    model.fit(data, callbacks=[broadcast, hvd_keras.callbacks.MetricAverageCallback()], verbose=hvd_keras.rank() == 0)
    hvd_standalone.init()
    print(hvd_standalone.size(), hvd_standalone.DistributedOptimizer(optimizer, compression=hvd_standalone.TopK(0.1)))
