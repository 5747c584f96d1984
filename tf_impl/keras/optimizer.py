"""hvd.DistributedOptimizer for Keras 3 and Keras 2 (tf_keras), that takes a compressor."""

from typing import Any

import horovod.tensorflow as horovod

from horovod_powersgd.arguments import check_passes, check_predivide_factor, groups_of, refuse_misplaced
from horovod_powersgd.tensorflow.keras import loss_scaling
from horovod_powersgd.tensorflow.keras.aggregation import Aggregation
from horovod_powersgd.tensorflow.keras.distributed import DistributedMethods, distribute
from horovod_powersgd.tensorflow.keras.eligibility import check_optimizer
from horovod_powersgd.tensorflow.keras.keras2 import Keras2Methods
from horovod_powersgd.tensorflow.keras.keras3 import Keras3Methods
from horovod_powersgd.tensorflow.keras_version import KERAS_3
from horovod_powersgd.tensorflow.reduction import Reduction

_METHODS: type[DistributedMethods] = Keras3Methods if KERAS_3 else Keras2Methods


def DistributedOptimizer(
    optimizer,
    name=None,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    gradient_predivide_factor=1.0,
    op=horovod.Average,
    backward_passes_per_step=1,
    average_aggregated_gradients=False,
    num_groups=0,
    groups=None,
    process_set=horovod.global_process_set,
    scale_local_gradients=True,
) -> Any:
    """horovod.tensorflow.keras.DistributedOptimizer, for Keras 3 as well, whose compression can also be a compressor.

    Args:
        optimizer: to wrap. The result is this same object, made a distributed optimizer: whatever was set, built or
            learned stays. In a saved model it is an optimizer of its class, and loads without Horovod. One that is
            distributed already is wrapped anew, and begins with an empty memory.
        compression: a compressor such as PowerSGD, a generator function, or Compression.none or .fp16.
        (the others): as Horovod's.

    Raises:
        TypeError: it is no optimizer, or one of the Keras that tf.keras is not, or has a method set on the object
            itself that has to exchange; or compression is none.
        ValueError: what Horovod refuses.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), compression=hvd.PowerSGD(rank=4))
        >>> model.compile(optimizer=optimizer, loss=...)
    """
    refuse_misplaced(locals())
    check_optimizer(optimizer)
    check_predivide_factor(gradient_predivide_factor, op == horovod.Average, horovod.rocm_built())
    if op not in (horovod.Average, horovod.Sum):
        raise ValueError("op currently only supports Average and Sum")
    check_passes(backward_passes_per_step)
    groups = groups_of(num_groups, groups)
    if not (groups is None or isinstance(groups, list) or groups > 0):
        raise ValueError("groups should be a positive integer or a list of list of variables")
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
    aggregation = Aggregation(
        reduction,
        backward_passes_per_step,
        average_aggregated_gradients,
        process_set,
        scale_local_gradients,
    )
    if isinstance(optimizer, loss_scaling.loss_scale_optimizers()):
        distribute(optimizer.inner_optimizer, aggregation, _METHODS)
        return loss_scaling.expose_inner(optimizer)
    return distribute(optimizer, aggregation, _METHODS)


def PartialDistributedOptimizer(
    optimizer,
    name=None,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    gradient_predivide_factor=1.0,
    op=horovod.Average,
    groups=None,
    process_set=horovod.global_process_set,
    local_layers=None,
    scale_local_gradients=True,
) -> Any:
    """horovod.keras.PartialDistributedOptimizer: DistributedOptimizer that leaves some layers to each worker.

    Args:
        local_layers: a Keras layer or a list of them, built or not.
        (the others): as DistributedOptimizer's.

    Raises:
        ValueError: what is in local_layers is no layer; and as DistributedOptimizer.
    """
    distributed = DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    aggregation = loss_scaling.aggregation_inside(distributed) or distributed._aggregation
    aggregation.local.add_layers(local_layers)
    return distributed
