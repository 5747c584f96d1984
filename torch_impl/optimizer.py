"""hvd.DistributedOptimizer that takes a compressor."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import horovod.torch.optimizer as horovod_optimizer
import torch
from horovod.torch.compression import Compression
from horovod.torch.mpi_ops import Adasum, Average, ProcessSet, Sum, global_process_set, rocm_built, size

from horovod_powersgd.arguments import (
    check_op,
    check_passes,
    check_predivide_factor,
    compressor_of,
    groups_of,
    refuse_misplaced,
)
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.compressing import CompressingMethods
from horovod_powersgd.torch.distributed import DistributedMethods, Horovods
from horovod_powersgd.torch.engine import Engine
from horovod_powersgd.torch.transport import Transported

# Those that there are.
_distributed: "weakref.WeakSet[Any]" = weakref.WeakSet()


class _Made:
    """Comes between a distributed optimizer's class and the wrapped one: Horovod calls the latter's constructor, and
    the optimizer is there already."""

    def __init__(self, *args):
        pass


def _wrap(optimizer: torch.optim.Optimizer, methods: Mapping[str, object], *args, **kwargs) -> torch.optim.Optimizer:
    """Makes an optimizer a distributed one. It stays the object that it is, with its state, attributes and hooks.

    Args:
        optimizer: may be distributed already.
        methods: of Horovod's optimizer, or more of them.
        args, kwargs: of their constructor, after the parameters.
    """
    given, before = type(optimizer), dict(vars(optimizer))
    base = getattr(given, "_wrapped_class", given)
    own = vars(optimizer)
    for name in ("_hooks", "_released", "_engine", "_party"):
        own.pop(name, None)
    if "step" in own:
        own["_own_step"] = own.pop("step")
    # Horovod knows its optimizers by their module, and does not step them where it must not.
    members = {**methods, "__module__": Horovods.__module__, "_wrapped_class": base}
    try:
        optimizer.__class__ = type(base.__name__, (_Made, base), members)
        type(optimizer).__init__(optimizer, optimizer.param_groups, *args, **kwargs)
    except BaseException:
        own.clear()
        own.update(before)
        optimizer.__class__ = given
        raise
    if before.get("_hooks") is not None:
        agreement.leave(before["_party"])
    previous = [before.get("_engine"), *_release_parameters_of(optimizer)]
    engine = own.get("_engine")
    for other in previous:
        if engine is not None and other is not None:
            engine.take_over(other)
    return optimizer


def _release_parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Engine | None]:
    """Takes them from other distributed optimizers that have some of them; gives these one's engines.

    With Horovod's own compressions, two optimizers may share some.
    """
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for other in list(_distributed):
        theirs = {id(p) for group in other.param_groups for p in group["params"]}
        engines = getattr(optimizer, "_engine", None), getattr(other, "_engine", None)
        if other is not optimizer and theirs & mine and (any(engines) or theirs <= mine):
            other.release()
            _distributed.discard(other)
            yield engines[1]
    if hasattr(optimizer, "release"):
        _distributed.add(optimizer)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters=None,
    compression=Compression.none,
    backward_passes_per_step: int = 1,
    op=Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups=None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """horovod.torch.DistributedOptimizer, whose compression can also be a compressor.

    Args:
        optimizer: to wrap. The result is this same object, now an instance of a subclass of its class: state,
            attributes, hooks and schedulers stay. One that is distributed already is wrapped anew.
        named_parameters: (name, parameter) of all its parameters, usually model.named_parameters(). A parameter's
            name chooses its random numbers.
        compression: a horovod_powersgd.PowerSGD or another Compressor, or a generator function (see Custom); or
            Compression.none or .fp16, with which this is Horovod's own.
        (the others): as Horovod's.

    Raises:
        TypeError: compression is none of these, or optimizer is none.
        ValueError: a compressor with op=Adasum, or what Horovod refuses.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
        ...                                      compression=hvd.PowerSGD(rank=4))
    """
    refuse_misplaced(locals())
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}: wrap the one whose step() changes the "
            "parameters"
        )
    arguments = dict(
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    compressor = compressor_of(compression)
    adasum = op == Adasum and size() > 1
    check_op(compressor, op in (Average, Sum))
    check_predivide_factor(gradient_predivide_factor, op == Average, rocm_built())
    check_passes(backward_passes_per_step)
    arguments["groups"] = groups_of(num_groups, groups)
    if adasum:
        methods = vars(horovod_optimizer._DistributedAdasumOptimizer)
        return _wrap(optimizer, methods, named_parameters, compression, backward_passes_per_step)
    methods = {**vars(Horovods), **vars(DistributedMethods)}
    if compressor is not None:
        methods.update(vars(CompressingMethods))
    return _wrap(optimizer, methods, named_parameters, compressor or Transported(compression), **arguments)
