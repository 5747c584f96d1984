"""The methods of every distributed optimizer, which come before those of the wrapped optimizer's class."""

import warnings
import weakref
from typing import Any

import horovod.torch.optimizer as horovod_optimizer
import torch
from horovod.torch.mpi_ops import Sum

from horovod_powersgd.agreement import configuration
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.uncompressed import Uncompressed
from horovod_powersgd.torch.workers import Workers

Horovods: Any = horovod_optimizer._DistributedOptimizer


class DistributedMethods(Horovods):
    """Horovod's optimizer with Horovod's compression, and what users miss in it.

    Horovod's methods say super(self.__class__, self), so the class of an optimizer is made, as Horovod makes its
    own, by putting these methods and Horovod's into a direct subclass of the wrapped optimizer's class.
    """

    # Which of several wrappings the hooks belong to; None until all of Horovod's attributes are there.
    _hooks = None
    # Whether another wrapping has taken the parameters over.
    _released = False
    # A step() of the optimizer itself, not of its class: schedulers put one there.
    _own_step = None
    # Whether a GradScaler has made it synchronize.
    _before_unscaling = False

    def _start_hooking(self):
        self._hooks = object()
        self._workers = Workers(process_set=self.process_set, predivide_factor=self.gradient_predivide_factor)

    def _register_hooks(self):
        self._start_hooking()
        self._party: Any = Uncompressed(self._workers, self._agreement(), self._parameter_names, self._requires_update)
        Horovods._register_hooks(self)

    def release(self):
        """Ends the exchange of this wrapping, when another one takes its parameters over."""
        if self._hooks is not None:
            agreement.leave(self._party)
        self._hooks, self._released = None, True

    def _refuse_released(self):
        if self._released:
            raise RuntimeError(
                f"The parameters of this {type(self).__name__} have been given to another DistributedOptimizer since, "
                "which exchanges their gradients: use that one"
            )

    def _agreement(self):
        """What must be the same on every worker, beside the parameters; in words."""
        groups = self._groups
        if isinstance(groups, list):
            groups = [[self._parameter_names.get(p) for p in group] for group in groups]
        return configuration(
            repr(self._compression), self.op == Sum, self.gradient_predivide_factor, groups, self.sparse_as_dense
        )

    def _hook_parameters(self):
        """Hooks the parameters that have become trainable since the last call."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._requires_update:
                    self._requires_update.add(p)
                    # Of the node that accumulates: it calls these hooks after all that users have put on parameters.
                    with torch.enable_grad():
                        node = p.expand_as(p).grad_fn.next_functions[0][0]
                    node.register_hook(self._make_hook(p))
                    self._grad_accs.append(node)
                    if self._groups is not None:
                        # Horovod made its groups at the start; what comes later is a group of its own.
                        self._p_to_group[p] = (p,)
                        self._group_counts[(p,)] = 0

    def _make_hook(self, p):
        # A hook must not keep the optimizer alive, nor work for one that has been wrapped again.
        ref, hooks = weakref.ref(self), self._hooks

        def hook(_, incoming):
            optimizer = ref()
            if optimizer is not None and optimizer._hooks is hooks:
                optimizer._gradient_is_here(p, incoming[0])

        return hook

    def _gradient_is_here(self, p, incoming):
        self._synchronized = self._before_unscaling = False
        self._compression.incoming = incoming
        try:
            Horovods._make_hook(self, p)()
        finally:
            self._compression.incoming = None

    def _allreduce_grad_async(self, p):
        if p.grad is None and self._party.sparse_dims.get(p):
            # Another worker's batch may have touched the embedding.
            p.grad = torch.zeros_like(p).to_sparse(self._party.sparse_dims[p])
        return Horovods._allreduce_grad_async(self, p)

    def add_param_group(self, param_group):
        """As the wrapped optimizer's; the new parameters are exchanged, too."""
        super(self.__class__, self).add_param_group(param_group)
        if self._hooks is not None:
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
        self._refuse_released()
        if self._hooks is not None:
            self._hook_parameters()
            if self._requires_update and self._party.generation is not generation():
                agreement.agree(self._party)
        Horovods.synchronize(self)

    def step(self, closure=None):
        """As Horovod's. What a closure computes is exchanged each time that it is called."""
        self._refuse_released()
        if self._should_synchronize and closure is not None:
            closure = self._exchanged(closure)
        else:
            self._complete()
        self._synchronized = self._before_unscaling = False
        loss = self._take_step(closure)
        self._synchronized = False
        return loss

    # For schedulers that are made after wrapping; those made before find their own step in _own_step. And for PyTorch,
    # which calls step hooks around the wrapped optimizer's step, and is not to call them around this one as well.
    vars(step).update(_wrapped_by_lr_sched=True, hooked=True)

    def _complete(self):
        """What comes before a step: the exchange, unless it is there or not wanted."""
        if self._should_synchronize and not self._before_unscaling:
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() after optimizer.synchronize() averages the gradients a second time: put "
                    "optimizer.skip_synchronize() around it",
                    stacklevel=3,
                )
            self.synchronize()

    def _exchanged(self, closure):
        """The closure, and after it the exchange of what it computes, the loss included: an optimizer that looks at it
        must come to the same decisions on all workers."""

        def exchanged():
            loss = closure()
            self._exchange_now()
            return self._mean_loss(loss)

        return exchanged

    def _exchange_now(self):
        self.synchronize()

    def _mean_loss(self, loss):
        if loss is None or self._hooks is None or self._workers.count == 1:
            return loss
        mean = self._workers.mean(torch.as_tensor(loss).detach().double().cpu().reshape(-1), "loss").result()
        return mean.reshape(loss.shape).to(loss) if torch.is_tensor(loss) else mean.item()

    def _take_step(self, closure):
        """The wrapped optimizer's step."""
        self._opt_called = True  # which schedulers ask
        if self._own_step is not None:
            return self._own_step() if closure is None else self._own_step(closure)
        return super(self.__class__, self).step(closure)

    def before_unscaling(self, scaler):
        """Completes the exchange, for a GradScaler that is about to look at the gradients."""
        if not self._synchronized:
            self.synchronize()
            self._before_unscaling = True

    def unscaled(self, factor):
        """Is told what a GradScaler has multiplied the gradients by."""

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
        self._synchronized = self._before_unscaling = False
        # Not all optimizers take the argument.
        super(self.__class__, self).zero_grad(*([] if set_to_none is True else [set_to_none]))
