"""Keras code that imports Horovod itself, in workers that `python -m horovod_powersgd run` has started. They have
imported this package before."""

import horovod.keras
import horovod.tensorflow

import horovod_powersgd.tensorflow.keras as hvd
from horovod_keras_training import train


def check_a_training_that_imports_horovod_compresses_and_has_the_same_bits_on_all_workers():
    model = train()
    stats = model.optimizer.compression_stats()
    assert stats.steps == 3 and stats.ratio > 10
    hvd.assert_replicas_equal(model)
    for module in (horovod.tensorflow, horovod.keras):
        assert module.DistributedOptimizer.__module__.startswith("horovod_powersgd"), module
