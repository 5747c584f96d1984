"""The exchange of one optimizer's gradients, step by step, while backward computes them."""

from typing import Dict, Generator, List, Sequence, Tuple, Union

import torch

from horovod_powersgd import PowerSGD
from horovod_powersgd.layout import Layout, layout_of
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.torch.workers import Mean, Workers
from horovod_powersgd.torch.bucket import Verdict, make_buckets
from horovod_powersgd.torch.gradient import MatrixGradient, PlainGradient


class Engine:
    """Runs the buckets' exchanges: each goes on as soon as what it waits for is there, whatever the others do.

    Args:
        parameters: (name, parameter) in an order that is the same on every worker.
        config: the same on every worker.
        workers: that take part.
        sum_gradients: deliver the sum over the workers in place of the mean.
        groups: Horovod's, see make_buckets.
    """

    def __init__(
        self,
        parameters: Sequence[Tuple[str, torch.nn.Parameter]],
        config: PowerSGD,
        workers: Workers,
        sum_gradients: bool = False,
        groups: Union[None, int, Sequence] = None,
    ):
        self._config, self._workers, self._sum_gradients = config, workers, sum_gradients
        self._gradients: List[PlainGradient] = []
        warmup: List[PlainGradient] = []
        for name, parameter in parameters:
            layout = layout_of(parameter.shape, config)
            plain = PlainGradient(name, parameter, layout)
            self._gradients.append(MatrixGradient(name, parameter, layout, config) if layout.compressed else plain)
            warmup.append(plain)
        self._buckets = make_buckets(self._gradients, workers, "bucket", groups)
        self._warmup_buckets = make_buckets(warmup, workers, "warmup", groups) if config.warmup_steps else []
        self._waiting: Dict[Generator, object] = {}
        self._arriving: Dict[torch.nn.Parameter, PlainGradient] = {}
        self._steps = self._bytes_sent = self._total_bytes_sent = self._exchanges = 0

    def arrived(self, parameter: torch.nn.Parameter) -> None:
        """Takes in a gradient that backward has finished, and lets the exchanges go on as far as they can."""
        if not self._arriving:
            self._begin()
        self._arriving[parameter].arrived = True
        self._resume()

    def finish(self) -> None:
        """Completes the step: afterwards the updates stand in the gradients.

        A gradient that has not arrived takes part as it is, and as zeros where there is none, because another worker
        may have computed it.

        Raises:
            HorovodInternalError: a worker was lost. Memories and factors are as they were before the step.
        """
        if not self._arriving:
            self._begin()
        try:
            for parameter, gradient in self._arriving.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient.arrived = True
            self._resume()
            while self._waiting:
                # A verdict comes with the other buckets' means.
                means = [awaited for awaited in self._waiting.values() if isinstance(awaited, Mean)]
                if means:
                    means[0].result()
                self._resume()
        finally:
            self.reset()
        self._steps += self._verdict.result()
        self._exchanges += 1
        self._bytes_sent = self._sent
        self._total_bytes_sent += self._sent

    def reset(self) -> None:
        """Forgets a step that was begun."""
        for gradient in self._arriving.values():
            gradient.arrived = False
        self._arriving, self._waiting = {}, {}

    def stats(self) -> CompressionStats:
        """What compression did in the last step and so far."""
        uncompressed = sum(g.parameter.numel() * g.parameter.element_size() for g in self._gradients)
        return CompressionStats(
            steps=self._steps,
            bytes_sent=self._bytes_sent,
            bytes_uncompressed=uncompressed if self._exchanges else 0,
            total_bytes_sent=self._total_bytes_sent,
            total_bytes_uncompressed=uncompressed * self._exchanges,
            tensors=tuple(_tensor_stats(gradient) for gradient in self._gradients),
        )

    @torch.no_grad()
    def _begin(self) -> None:
        buckets = self._warmup_buckets if self._steps < self._config.warmup_steps else self._buckets
        self._arriving = {gradient.parameter: gradient for bucket in buckets for gradient in bucket.gradients}
        self._verdict, self._sent = Verdict(len(buckets)), 0
        factor = self._workers.count if self._sum_gradients else 1
        for bucket in buckets:
            exchange = bucket.exchange(self._verdict, self._steps, self._config.num_iters_per_step, factor)
            self._waiting[exchange] = next(exchange)

    @torch.no_grad()
    def _resume(self) -> None:
        for exchange, awaited in list(self._waiting.items()):
            try:
                while awaited.done():
                    self._waiting[exchange] = awaited = exchange.send(awaited.result())
            except StopIteration as finished:
                self._sent += finished.value
                del self._waiting[exchange]


def _tensor_stats(gradient: PlainGradient) -> TensorStats:
    layout: Layout = gradient.layout
    return TensorStats(
        name=gradient.name,
        shape=layout.shape,
        matrix_shape=layout.matrix_shape,
        rank=layout.rank,
        compressed=layout.compressed,
        reason=layout.reason,
        residual=gradient.residual(),
    )
