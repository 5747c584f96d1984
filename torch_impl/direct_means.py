"""Gradients that are averaged as they are or in half precision, each in a message of its own, as Horovod's own
optimizer sends them."""

from collections.abc import Iterable

import torch

from horovod_powersgd.torch.futures import Mean
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.ownership import owns_storage
from horovod_powersgd.torch.workers import Workers


class DirectMeans:
    """What an Engine does for gradients of which nothing is kept, in a fraction of its calls: no buckets, no verdict.

    Args:
        workers: that average.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        self._started: dict[PlainGradient, Mean] = {}

    def start(self, gradient: PlainGradient, incoming: torch.Tensor | None = None) -> None:
        """Starts averaging a gradient that backward has finished; `incoming` as Engine.arrived's."""
        given = gradient.parameter.grad
        assert given is not None
        if given.is_sparse:
            sent = given.to_dense().to(gradient.sent_dtype)
        elif owns_storage(given, incoming):
            sent = given.data.to(gradient.sent_dtype).contiguous()
        else:
            sent = given.data.to(gradient.sent_dtype, copy=True, memory_format=torch.contiguous_format)
        self._started[gradient] = self._workers.mean(sent, f"direct.{gradient.name}", in_place=True)

    def finish(self, gradients: Iterable[PlainGradient], factor: float) -> int:
        """Puts all averages, times `factor`, into the gradients. Those that were not started take part as they are, and
        as zeros where there are none.

        Returns:
            The bytes that were averaged.
        """
        for gradient in gradients:
            if gradient not in self._started:
                if gradient.parameter.grad is None:
                    gradient.make_zero()
                self.start(gradient)
        nbytes = 0
        for gradient, started in self._started.items():
            mean, given = started.result(), gradient.parameter.grad
            assert given is not None
            nbytes += mean.nbytes
            if factor != 1:
                mean.mul_(factor)
            if given.is_sparse:
                gradient.parameter.grad = mean.to(given.dtype).to_sparse(given.sparse_dim())
            elif mean.data_ptr() != given.data_ptr():
                given.data.copy_(mean)
        self._started = {}
        return nbytes

    def forget(self) -> None:
        """Lets go of what was started."""
        self._started = {}
