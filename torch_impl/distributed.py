"""What comes between a wrapped optimizer's class and its user: the methods of a distributed optimizer."""

import warnings
import weakref
from typing import Dict, Iterable, List, Mapping, Optional, Set, Union

import horovod.torch.optimizer as horovod_optimizer
import torch
from horovod.torch.mpi_ops import Sum

from horovod_powersgd.agreement import Description, configuration
from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.control_messages import largest
from horovod_powersgd.torch.engine import Engine, describe, sparse_dim
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.workers import Workers

Horovods = horovod_optimizer._DistributedOptimizer


class Uncompressed:
    """An optimizer with Horovod's own compression, in the workers' agreement: all it wants to know is whether the
    others have one, too.

    Attributes:
        generation: of the workers that it has agreed with.
        sparse_dims: of the gradients that are sparse on some worker; 0 for the others.
    """

    uncompressed, steps = True, 0

    def __init__(
        self,
        workers: Workers,
        agreement_on: Description,
        parameter_names: Mapping[torch.nn.Parameter, str],
        trainable: Set[torch.nn.Parameter],
    ):
        self.workers, self._agreement_on = workers, agreement_on
        self._parameter_names, self._trainable = parameter_names, trainable
        self.generation: object = None
        self.sparse_dims: Mapping[torch.nn.Parameter, int] = {}
        agreement.enter(self)

    def names(self) -> List[str]:
        return list(self._parameter_names.values())

    def description(self) -> Description:
        return {
            **self._agreement_on,
            **describe([(name, p) for p, name in self._parameter_names.items() if p in self._trainable]),
        }

    def agreed(self, root: Optional[int], by_name: bool) -> None:
        parameters = sorted(self._parameter_names, key=self._parameter_names.get)
        # A worker that computed no gradient cannot know that it is sparse.
        dims = largest(self.workers, [sparse_dim(p) for p in parameters], "sparse")
        self.sparse_dims = dict(zip(parameters, dims))
        self.generation = generation()


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
        self._party = Uncompressed(self._workers, self._agreement(), self._parameter_names, self._requires_update)
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
    step._wrapped_by_lr_sched = step.hooked = True

    def _complete(self):
        """What comes before a step: the exchange, unless it is there or not wanted."""
        if self._should_synchronize and not self._before_unscaling:
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() after optimizer.synchronize() averages the gradients a second time: put "
                    "optimizer.skip_synchronize() around it"
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


class CompressingMethods(DistributedMethods):
    """The gradients are handed to an engine in place of allreduce."""

    def __init__(self, params, named_parameters, compression, *args, **kwargs):
        Horovods.__init__(self, params, named_parameters, compression, *args, **kwargs)
        if self.process_set.included() and self._hooks is None:
            # Horovod registers none for one worker, but compression changes what one worker learns, too.
            self._register_hooks()

    def _register_hooks(self):
        self._start_hooking()
        ref = weakref.ref(self)
        self._party = self._engine = Engine(
            self._compression,
            self._workers,
            agreement=self._agreement(),
            sum_gradients=self.op == Sum,
            groups=self._groups,
            sparse_as_dense=self.sparse_as_dense,
            learning_rates=(lambda: _learning_rates(ref())) if isinstance(self._compression, Accordion) else dict,
        )
        # The engine knows the groups; the hooks are those of single parameters.
        self._groups = None
        for group in self.param_groups:
            for p in group["params"]:
                self._engine.add(self._parameter_names[p], p)
        self._hook_parameters()

    def add_param_group(self, param_group):
        """As the wrapped optimizer's; the new parameters are exchanged, too."""
        DistributedMethods.add_param_group(self, param_group)
        if self._hooks is not None:
            for p in self.param_groups[-1]["params"]:
                self._engine.add(self._parameter_names[p], p)

    def _gradient_is_here(self, p, incoming):
        if self._handles.get(p) and self._allreduce_delay[p] <= 0:
            self._engine.note(p)  # this error tells of the change
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
                "backward_passes_per_step to accumulate gradients locally."
            )
        self._allreduce_delay[p] -= 1
        last = self._allreduce_delay[p] == 0
        self._handles[p] = last
        if not last:
            self._engine.discard()
            return
        try:
            self._engine.arrived(p, incoming)
        except BaseException:
            self._end_exchange()
            raise

    def _exchange(self, undoable: bool) -> None:
        self._hook_parameters()
        try:
            self._engine.finish(undoable)
        finally:
            self._end_exchange()

    def _end_exchange(self):
        self._handles.clear()
        self.set_backward_passes_per_step(self.backward_passes_per_step)

    def synchronize(self):
        """Waits until the updates of all workers stand in the gradients. A second call before step() changes nothing.

        What the exchange leaves in memories and factors becomes theirs in step(): zero_grad() or another backward in
        its place leaves them as they were.

        Raises:
            HorovodInternalError: a worker was lost.
            RuntimeError: the workers do not agree on the model or the configuration; or a gradient was changed while it
                was exchanged.
        """
        self._refuse_released()
        if self._hooks is not None and (not self._engine.pending or self._engine.replaced):
            self._exchange(undoable=True)
        self._synchronized = True

    def _complete(self):
        if self._hooks is not None:
            if self._should_synchronize and not self._engine.pending:
                self._exchange(undoable=False)
            self._engine.commit()

    def _exchange_now(self):
        if self._hooks is not None:
            self._exchange(undoable=False)
            self._engine.commit()

    def before_unscaling(self, scaler):
        """Completes the exchange, for a GradScaler that is about to look at the gradients."""
        self.follow_loss_scale(scaler)
        self.synchronize()

    def unscaled(self, factor):
        """Is told what a GradScaler has multiplied the gradients by."""
        if self._hooks is not None:
            self._engine.unscaled(factor)

    def zero_grad(self, set_to_none: bool = True):
        """As the wrapped optimizer's. A step that was exchanged and not taken leaves no trace.

        Raises:
            AssertionError: gradients are on their way.
        """
        DistributedMethods.zero_grad(self, set_to_none)
        if self._hooks is not None:
            self._engine.discard()

    def load_state_dict(self, *args, **kwargs):
        if self._hooks is not None:
            self._engine.reset()
            self._engine.discard()
        Horovods.load_state_dict(self, *args, **kwargs)

    def _member_engine(self) -> Engine:
        self._refuse_released()
        if self._hooks is None:
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
        """Rescales the memory when the scaler changes the loss scale, from the first step on.

        The scaler tells of itself when it unscales; a call is needed only where a compressor other than PowerSGD is to
        know the scale in the very first step, and synchronize() comes before the scaler.
        """
        if self._hooks is not None:
            self._engine.follow_loss_scale(scaler)


def _learning_rates(optimizer: torch.optim.Optimizer) -> Dict[torch.nn.Parameter, float]:
    groups = [group for group in optimizer.param_groups if group.get("lr") is not None]
    return {p: float(group["lr"]) for group in groups for p in group["params"]}
