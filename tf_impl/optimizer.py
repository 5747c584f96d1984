"""hvd.DistributedOptimizer that takes a compressor: for optimizers of TensorFlow 1 (tf.compat.v1.train) and Keras."""

from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from horovod_powersgd.arguments import compressor_of, refuse_misplaced
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.tensorflow.reduction import Reduction

# In horovod.tensorflow, activate() puts the one below there.
_horovods_optimizer = horovod.DistributedOptimizer


class _DistributedOptimizer(horovod._DistributedOptimizer):
    """Horovod's optimizer for those of TensorFlow 1, of any compression: compute_gradients averages."""

    def __init__(self, optimizer, name, *arguments, reduction: Reduction, **options):
        super().__init__(optimizer, name, *arguments, **options)
        self._reduction = reduction
        self._allreduce_grads = self._average
        if self._agg_helper is not None:
            self._agg_helper._allreduce_grads = self._average

    def _average(self, gradients, variables, use_generic_names=False):
        return self._reduction(gradients, variables, use_generic_names, _learning_rate(self._optimizer))

    def compression_stats(self) -> CompressionStats:
        """What compression did in the last step and in all steps so far, for this worker; for eager execution.

        Raises:
            RuntimeError: nothing was compressed yet.
        """
        if self._reduction.exchange is None:
            raise RuntimeError("this optimizer has compressed nothing yet")
        return self._reduction.exchange.stats()


def _learning_rate(optimizer):
    """That of an optimizer of TensorFlow 1, under the names that those give it; None where it has none."""
    rate = getattr(optimizer, "_learning_rate", getattr(optimizer, "_lr", None))
    return rate() if callable(rate) else rate


def DistributedOptimizer(
    optimizer,
    name=None,
    use_locking=False,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    backward_passes_per_step=1,
    op=horovod.Average,
    gradient_predivide_factor=1.0,
    average_aggregated_gradients=False,
    num_groups=0,
    groups=None,
    process_set=horovod.global_process_set,
    scale_local_gradients=True,
) -> Any:
    """horovod.tensorflow.DistributedOptimizer, whose compression can also be a compressor.

    Args:
        optimizer: of tf.compat.v1.train, or Keras's: for those see horovod_powersgd.tensorflow.keras.
        compression: a compressor such as PowerSGD, a generator function, or Compression.none or .fp16.
        (the others): as Horovod's.

    Raises:
        TypeError: what horovod_powersgd.tensorflow.keras's refuses.
        ValueError: a compressor with op=Adasum, or what Horovod refuses.
    """
    refuse_misplaced(locals())
    options = dict(
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        # That package imports this one.
        from horovod_powersgd.tensorflow.keras.optimizer import DistributedOptimizer as DistributedKerasOptimizer

        return DistributedKerasOptimizer(optimizer, **options)
    if compressor_of(compression) is None:
        return _horovods_optimizer(optimizer, use_locking=use_locking, **options)
    if num_groups and groups is None:
        groups = num_groups
    reduction = Reduction(
        compression,
        name or f"Distributed{type(optimizer).__name__}",
        device_dense,
        device_sparse,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        groups,
        process_set,
    )
    for used in ("compression", "num_groups"):
        options.pop(used)
    return _DistributedOptimizer(optimizer, use_locking=use_locking, reduction=reduction, **options)
