"""hvd.DistributedOptimizer that takes a compressor."""

import itertools
import warnings
from collections import defaultdict
from typing import Dict, Iterable, Mapping, Union

import horovod.torch.optimizer as horovod_optimizer
import torch
from horovod.torch.compression import Compression
from horovod.torch.mpi_ops import Adasum, Average, ProcessSet, Sum, global_process_set, rocm_built, size

from horovod_powersgd.accordion import Accordion
from horovod_powersgd.compressor import compressor_of
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.torch.engine import Engine, describe
from horovod_powersgd.torch.workers import Workers

_Horovod = horovod_optimizer._DistributedOptimizer

# Counts the optimizers of each process set, on every worker alike, so that their tensors' names differ.
_numbers = defaultdict(itertools.count)


class _DistributedOptimizer(_Horovod):
    """Horovod's optimizer with Horovod's compression, and what users miss in it.

    Horovod's methods say super(self.__class__, self), so the class of an optimizer is made, as Horovod makes its
    own, by putting these methods and Horovod's into a direct subclass of the wrapped optimizer's class.
    """

    # Until all of Horovod's attributes are there, parameters are not hooked.
    _hooked = False

    def _start_hooking(self):
        self._hooked = True
        self._workers = Workers(
            process_set=self.process_set,
            prefix=f"powersgd.{next(_numbers[self.process_set.process_set_id])}",
            predivide_factor=self.gradient_predivide_factor,
        )
        self._world = None

    def _register_hooks(self):
        self._start_hooking()
        _Horovod._register_hooks(self)

    def _agreement(self):
        """What must be the same on every worker, beside the parameters; in words."""
        groups = self._groups
        if isinstance(groups, list):
            groups = [[self._parameter_names.get(p) for p in group] for group in groups]
        return {
            "compression": getattr(self._compression, "__name__", repr(self._compression)),
            "op": "Sum" if self.op == Sum else "Average",
            "gradient_predivide_factor": repr(self.gradient_predivide_factor),
            "groups": repr(groups),
            "sparse_as_dense": repr(self.sparse_as_dense),
        }

    def _hook_parameters(self):
        """Hooks the parameters that have become trainable since the last call."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._requires_update:
                    self._requires_update.add(p)
                    self._grad_accs.append(p.register_post_accumulate_grad_hook(self._make_hook(p)))
                    if self._groups is not None:
                        # Horovod made its groups at the start; what comes later is a group of its own.
                        self._p_to_group[p] = (p,)
                        self._group_counts[(p,)] = 0

    def add_param_group(self, param_group):
        """As the wrapped optimizer's; the new parameters are exchanged, too."""
        super(self.__class__, self).add_param_group(param_group)
        if self._hooked:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                self._parameter_names.setdefault(p, f"allreduce.noname.{len(self.param_groups) - 1}.{i}")
                self._allreduce_delay[p] = self.backward_passes_per_step
            self._hook_parameters()

    def synchronize(self):
        """Waits until the averages stand in the gradients.

        Raises:
            HorovodInternalError: a worker was lost.
            RuntimeError: the workers do not agree on the model or the configuration.
        """
        if self._hooked:
            self._hook_parameters()
            if self._world is not self._workers.world():
                trainable = [(n, p) for p, n in self._parameter_names.items() if p in self._requires_update]
                self._workers.agree({**self._agreement(), **describe(trainable)}, steps=0)
                self._world = self._workers.world()
        _Horovod.synchronize(self)

    def zero_grad(self, set_to_none: bool = True):
        """As the wrapped optimizer's; Horovod's takes no argument.

        Raises:
            AssertionError: gradients are on their way.
        """
        if self._handles:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        super(self.__class__, self).zero_grad(set_to_none)

    def step(self, closure=None):
        """As Horovod's. What a closure computes is exchanged each time that it is called."""
        if closure is None or not self._should_synchronize:
            return _Horovod.step(self, closure)

        def exchanged():
            loss = closure()
            self.synchronize()
            return loss

        with self.skip_synchronize():
            loss = _Horovod.step(self, exchanged)
        self._synchronized = False
        return loss


class _CompressingOptimizer(_DistributedOptimizer):
    """The gradients are handed to an engine in place of allreduce."""

    def __init__(self, params, named_parameters, compression, *args, **kwargs):
        _Horovod.__init__(self, params, named_parameters, compression, *args, **kwargs)
        if self.process_set.included() and not self._hooked:
            # Horovod registers none for one worker, but compression changes what one worker learns, too.
            self._register_hooks()

    def _register_hooks(self):
        self._start_hooking()
        self._engine = Engine(
            self._compression,
            self._workers,
            agreement=self._agreement(),
            sum_gradients=self.op == Sum,
            groups=self._groups,
            sparse_as_dense=self.sparse_as_dense,
            learning_rates=self._learning_rates if isinstance(self._compression, Accordion) else dict,
        )
        # The engine knows the groups; the hooks are those of single parameters.
        self._groups = None
        for group in self.param_groups:
            for p in group["params"]:
                self._engine.add(self._parameter_names[p], p)
        self._hook_parameters()

    def _learning_rates(self):
        groups = [group for group in self.param_groups if group.get("lr") is not None]
        return {p: float(group["lr"]) for group in groups for p in group["params"]}

    def add_param_group(self, param_group):
        """As the wrapped optimizer's; the new parameters are exchanged, too."""
        _DistributedOptimizer.add_param_group(self, param_group)
        if self._hooked:
            for p in self.param_groups[-1]["params"]:
                self._engine.add(self._parameter_names[p], p)

    def _allreduce_grad_async(self, p):
        self._engine.arrived(p)
        return self._engine, None

    def synchronize(self):
        """Waits until the updates of all workers stand in the gradients.

        Raises:
            HorovodInternalError: a worker was lost.
            RuntimeError: the workers do not agree on the model or the configuration.
        """
        if self._hooked:
            self._hook_parameters()
            try:
                self._engine.finish()
            finally:
                self._handles.clear()
                self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized = True

    def load_state_dict(self, *args, **kwargs):
        if self._hooked:
            self._engine.reset()
        _Horovod.load_state_dict(self, *args, **kwargs)

    def _member_engine(self) -> Engine:
        if not self._hooked:
            raise RuntimeError("this worker is outside the optimizer's process set and compresses nothing")
        return self._engine

    def compression_stats(self) -> CompressionStats:
        """What compression did in the last step and in all steps so far, for this worker."""
        return self._member_engine().stats()

    def compression_state_dict(self) -> Dict[str, object]:
        """This worker's factors and memory: what a resumed run needs beside model and optimizer.

        Returns:
            Numbers, strings and CPU tensors, for torch.save; torch.load takes it with weights_only=True. Every worker
            saves its own.
        """
        return self._member_engine().state_dict()

    def load_compression_state_dict(self, states: Union[Mapping, Iterable[Mapping]]) -> None:
        """Goes on where compression_state_dict was called.

        Args:
            states: what this worker saved; or what all workers saved, in the workers' order (a list, or a generator
                that loads one after the other). Another number of workers than then needs all of them: the memories
                are shared out so that their mean stays.

        Raises:
            ValueError: another model or configuration, or states are missing. It names what differs.
        """
        self._member_engine().load_state_dict(states)

    def follow_loss_scale(self, scaler: torch.amp.GradScaler) -> None:
        """Rescales the memory when the scaler changes the loss scale. Call it once, before the first step."""
        if self._hooked:
            self._engine.follow_loss_scale(scaler)


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
):
    """horovod.torch.DistributedOptimizer, whose compression can also be a compressor.

    Args:
        optimizer: to wrap. The result is an instance of its class.
        named_parameters: (name, parameter) of all its parameters, usually model.named_parameters(). A parameter's
            name chooses its random numbers.
        compression: a horovod_powersgd.PowerSGD or another Compressor, or a generator function (see Custom); or
            Compression.none or .fp16, with which this is Horovod's own.
        (the others): as Horovod's.

    Raises:
        TypeError: compression is none of these.
        ValueError: a compressor with op=Adasum, or what Horovod refuses.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
        ...                                      compression=hvd.PowerSGD(rank=4))
    """
    arguments = dict(
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    compressor = compressor_of(compression)
    if compressor is None:
        if op == Adasum and size() > 1:
            return horovod_optimizer.DistributedOptimizer(
                optimizer, named_parameters, compression, num_groups=num_groups, **arguments
            )
    elif op not in (Average, Sum):
        name = type(compressor).__name__
        raise ValueError(f"{name} averages or sums gradients: op must be hvd.Average or hvd.Sum (Adasum is neither)")
    if gradient_predivide_factor != 1.0 and rocm_built():
        raise ValueError("gradient_predivide_factor not supported yet with ROCm")
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if num_groups != 0:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`.", DeprecationWarning)
        if groups is None:
            arguments["groups"] = num_groups
    base = optimizer.__class__
    methods = {**vars(_Horovod), **vars(_DistributedOptimizer)}
    if compressor is not None:
        methods.update(vars(_CompressingOptimizer))
    # Horovod knows its optimizers by their module, and does not step them where it must not.
    cls = type(base.__name__, (base,), {**methods, "__module__": _Horovod.__module__})
    distributed = cls(optimizer.param_groups, named_parameters, compressor or compression, **arguments)
    # For parameter groups that are added later.
    distributed.defaults = dict(optimizer.defaults)
    return distributed
