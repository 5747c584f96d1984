"""The methods of a distributed optimizer that compresses."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from horovod.torch.mpi_ops import Sum

from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.torch.auto_engine import AutoEngine
from horovod_powersgd.torch.distributed import DistributedMethods, Horovods
from horovod_powersgd.torch.engine import Engine


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
        engine = AutoEngine if isinstance(self._compression, Auto) else Engine
        self._party = self._engine = engine(
            self._compression,
            self._workers,
            agreement=self._agreement(),
            sum_gradients=self.op == Sum,
            groups=self._groups,
            sparse_as_dense=self.sparse_as_dense,
            learning_rates=(lambda: _learning_rates(ref())) if isinstance(self._compression, Accordion) else dict,
        )
        # The engine knows the groups; the hooks are those of single parameters.
        self._groups: Any = None
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
        delay = self._allreduce_delay[p]  # looked up once: of small models, lookups are a part of what a step takes
        if delay <= 0 and self._handles.get(p):
            self._engine.note(p)  # this error tells of the change
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
                "backward_passes_per_step to accumulate gradients locally."
            )
        self._allreduce_delay[p] = delay - 1
        self._handles[p] = last = delay == 1
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

    def compression_state_dict(self) -> dict[str, object]:
        """This worker's factors and memory: what a resumed run needs beside model and optimizer.

        Returns:
            Numbers, strings and CPU tensors, for torch.save; torch.load takes it with weights_only=True. Every worker
            saves its own.
        """
        return self._member_engine().state_dict()

    def load_compression_state_dict(self, states: Mapping | Iterable[Mapping]) -> None:
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


def _learning_rates(optimizer: Any) -> dict[torch.nn.Parameter, float]:
    groups = [group for group in optimizer.param_groups if group.get("lr") is not None]
    return {p: float(group["lr"]) for group in groups for p in group["params"]}
