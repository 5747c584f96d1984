"""Gradients that are averaged as they are or in half precision, each in a message of its own, as Horovod's own
optimizer sends them."""

from collections.abc import Iterable
from typing import Any

import torch
from horovod.torch.mpi_ops import allreduce_async_, synchronize

from horovod_powersgd.torch.gradient import PlainGradient, put_all
from horovod_powersgd.torch.ownership import owns_storage
from horovod_powersgd.torch.profiling import profiled
from horovod_powersgd.torch.workers import Workers


class DirectMeans:
    """One way of a DirectExchange: gradients leave as they come.

    Args:
        workers: that average.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        # By gradient, Horovod's handle of its average.
        self._started: dict[PlainGradient, Any] = {}
        # In this step, by dtype: asked for once, not for each gradient.
        self._averaging: dict[torch.dtype, dict[str, Any]] = {}

    def start(self, gradient: PlainGradient, incoming: torch.Tensor | None = None) -> None:
        """Starts averaging a gradient that backward has finished; `incoming` as Engine.arrived's."""
        given = gradient.parameter.grad
        assert given is not None
        dtype = gradient.sent_dtype
        if given.is_sparse:
            sent = given.to_dense().to(dtype)
        elif not owns_storage(given, incoming):
            sent = given.data.to(dtype, copy=True, memory_format=torch.contiguous_format)
        elif given.dtype == dtype and given.is_contiguous():
            sent = given
        else:
            sent = given.to(dtype).contiguous()
        how = self._averaging.get(dtype)
        if how is None:
            how = self._averaging[dtype] = self._workers.averaging(dtype)
        name = f"{self._workers.prefix}.direct.{gradient.name}"
        self._started[gradient] = allreduce_async_(sent, name=name, **how)

    @torch.no_grad()
    def finish(self, gradients: Iterable[PlainGradient], factor: float) -> int:
        """Puts all averages, times `factor`, into the gradients. Those that were not started take part as they are, and
        as zeros where there are none.

        Returns:
            The bytes that were averaged.
        """
        for gradient in gradients:
            if gradient not in self._started:
                gradient.make_zero()
                self.start(gradient)
        nbytes, elsewhere = 0, list[tuple[PlainGradient, torch.Tensor]]()
        for gradient, handle in self._started.items():
            with profiled("wait"):
                mean = synchronize(handle)
            given = gradient.parameter.grad
            assert given is not None
            nbytes += mean.nbytes
            if factor != 1:
                mean.mul_(factor)
            if given.is_sparse or mean.data_ptr() != given.data_ptr():
                elsewhere.append((gradient, mean))
        put_all(elsewhere)
        self.forget()
        return nbytes

    def forget(self) -> None:
        """Lets go of what was started."""
        self._started, self._averaging = {}, {}
