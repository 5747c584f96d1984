"""The exchange of one optimizer's gradients, step by step, while backward computes them."""

import threading
from types import MappingProxyType
from typing import Callable, Dict, Generator, Iterable, List, Mapping, Sequence, Tuple, Union

import torch

from horovod_powersgd import PowerSGD, checkpoint
from horovod_powersgd.agreement import Description
from horovod_powersgd.compressor import Compressor
from horovod_powersgd.layout import layout_of
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.torch.bucket import Step, Verdict, make_buckets
from horovod_powersgd.torch.compressed_gradient import CompressedGradient
from horovod_powersgd.torch.gradient import MatrixGradient, PlainGradient
from horovod_powersgd.torch.workers import Workers

DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16


class Engine:
    """Runs the buckets' exchanges: each goes on as soon as what it waits for is there, whatever the others do.

    Args:
        config: the same on every worker.
        workers: that take part.
        agreement: what else must be the same on every worker, in words.
        sum_gradients: deliver the sum over the workers in place of the mean.
        groups: Horovod's, see make_buckets.
        sparse_as_dense: compress sparse gradients, too.
        learning_rates: gives those of the parameters, as far as they are known.
    """

    def __init__(
        self,
        config: Compressor,
        workers: Workers,
        agreement: Description = MappingProxyType({}),
        sum_gradients: bool = False,
        groups: Union[None, int, Sequence] = None,
        sparse_as_dense: bool = False,
        learning_rates: Callable[[], Mapping[torch.nn.Parameter, float]] = dict,
    ):
        self._learning_rates = learning_rates
        self._config, self._workers, self._agreement = config, workers, agreement
        self._sum_gradients, self._groups, self._sparse_as_dense = sum_gradients, groups, sparse_as_dense
        self._gradients: List[PlainGradient] = []
        self._plain: Dict[PlainGradient, PlainGradient] = {}
        self._bucketed: Tuple = ()
        self._warming_up = False
        self._waiting: Dict[Generator, object] = {}
        self._arriving: Dict[torch.nn.Parameter, PlainGradient] = {}
        self._world: object = None
        self._loss_scale: Callable[[], float] = lambda: 1.0
        # Backward has a thread for each device.
        self._lock = threading.RLock()
        self._steps, self._turn = 0, False
        self._bytes_sent = self._total_bytes_sent = 0
        self._bytes_received = self._total_bytes_received = 0
        self._bytes_uncompressed = self._total_bytes_uncompressed = 0

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Takes in a parameter, between two steps; in an order that is the same on every worker."""
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return  # it cannot have a gradient
        if parameter.dtype not in DTYPES:
            kind = type(self._config).__name__
            raise ValueError(f"{kind} exchanges real gradients of 16 to 64 bits; {name} is {parameter.dtype}")
        layout = layout_of(parameter.shape, self._config)
        plain = PlainGradient(name, parameter, layout, self._sparse_as_dense)
        gradient = plain
        if layout.compressed:
            cls = MatrixGradient if isinstance(self._config.family, PowerSGD) else CompressedGradient
            gradient = cls(name, parameter, layout, self._config, self._sparse_as_dense)
        self._gradients.append(gradient)
        self._plain[gradient] = plain

    def follow_loss_scale(self, scaler) -> None:
        """Asks the scaler (get_scale) for the loss scale in each step: gradients and memory are in that scale."""
        self._loss_scale = scaler.get_scale

    def arrived(self, parameter: torch.nn.Parameter) -> None:
        """Takes in a gradient that backward has finished, and lets the exchanges go on as far as they can."""
        with self._lock:
            # The first exchange of a world waits for finish: workers may call backward in another order than step.
            if self._world is self._workers.world():
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
            RuntimeError: the workers do not agree on the model or the configuration.
        """
        try:
            if self._world is not self._workers.world():
                self._agree()
            if not self._arriving:
                self._begin()
            for parameter, gradient in self._arriving.items():
                if parameter.grad is None:
                    gradient.make_zero()
                gradient.arrived = True
            self._resume()
            while self._waiting:
                # A verdict comes with the other buckets' means.
                sent = [awaited for awaited in self._waiting.items() if not isinstance(awaited[1], Verdict)]
                if sent:
                    self._go_on(*sent[0])
                self._resume()
            self._count()
        finally:
            self.reset()

    def reset(self) -> None:
        """Forgets a step that was begun."""
        for gradient in self._arriving.values():
            gradient.arrived = False
        self._arriving, self._waiting = {}, {}

    def stats(self) -> CompressionStats:
        """What compression did in the last step and so far."""
        return CompressionStats(
            steps=self._steps,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            bytes_uncompressed=self._bytes_uncompressed,
            total_bytes_sent=self._total_bytes_sent,
            total_bytes_received=self._total_bytes_received,
            total_bytes_uncompressed=self._total_bytes_uncompressed,
            tensors=tuple(self._tensor_stats(gradient) for gradient in self._gradients),
        )

    def state_dict(self) -> Dict[str, object]:
        """What this worker has to keep for the exchange to go on where it is: tensors, numbers and strings."""
        tensors = {gradient.name: gradient.state_dict() for gradient in self._gradients}
        return checkpoint.state_dict(self._config, self._workers.count, self._workers.index, self._steps, tensors)

    def load_state_dict(self, states: Union[Mapping, Iterable[Mapping]]) -> None:
        """Goes on where the state was made.

        Args:
            states: this worker's state, or those of all workers in their order. With another number of workers than
                the state is from, all are needed: the memories are shared out so that their mean stays.

        Raises:
            ValueError: the state is of another model or configuration, or does not serve this number of workers.
        """
        shapes = {gradient.name: gradient.layout.shape for gradient in self._gradients}
        share = checkpoint.share_of(states, self._config, shapes, self._workers.count, self._workers.index)
        self._steps = share.steps
        for gradient in self._gradients:
            memories = [(t["memory"], t["memory_scale"]) for t in share.memories.get(gradient.name, ())]
            gradient.load_state_dict(share.tensors[gradient.name], memories, share.weight)

    def _tensor_stats(self, gradient: PlainGradient) -> TensorStats:
        decisions = gradient.adaptation.decisions if gradient.compressed else ()
        return TensorStats.of(
            gradient.name,
            gradient.layout,
            self._config,
            gradient.is_sparse,
            self._warming_up,
            gradient.residual,
            decisions,
        )

    def _count(self) -> None:
        self._steps += self._step.verdict.result()
        self._bytes_sent, self._bytes_received = self._step.sent, self._step.received
        self._bytes_uncompressed = sum(gradient.uncompressed_bytes() for gradient in self._arriving.values())
        self._total_bytes_sent += self._bytes_sent
        self._total_bytes_received += self._bytes_received
        self._total_bytes_uncompressed += self._bytes_uncompressed

    def _trainable(self) -> Tuple[PlainGradient, ...]:
        """The gradients of a step: a frozen parameter has none, on all workers."""
        gradients = tuple(gradient for gradient in self._gradients if gradient.parameter.requires_grad)
        if self._steps < self._config.warmup_steps:
            return tuple(self._plain[gradient] for gradient in gradients)
        return gradients

    @torch.no_grad()
    def _begin(self) -> None:
        gradients = self._trainable()
        self._warming_up = self._steps < self._config.warmup_steps
        if gradients != self._bucketed:
            self._buckets = make_buckets(gradients, self._workers, self._config, self._groups)
            self._bucketed = gradients
        self._arriving = {gradient.parameter: gradient for gradient in gradients}
        self._turn = not self._turn
        self._step = Step(
            number=self._steps,
            turn=self._turn,
            scale=self._loss_scale(),
            factor=self._workers.count if self._sum_gradients else 1,
            rates=self._learning_rates(),
            verdict=Verdict(len(self._buckets)),
            workers=self._workers,
        )
        for bucket in self._buckets:
            exchange = bucket.exchange(self._step)
            self._waiting[exchange] = next(exchange)

    def _agree(self) -> None:
        """Before the first exchange of these workers: all run the same training, and hold the same factors."""
        if self._workers.count > 1:
            gradients = self._trainable()
            parameters = describe([(gradient.name, gradient.parameter) for gradient in gradients])
            root = self._workers.agree({**self._agreement, **parameters}, self._steps)
            if root is not None:
                self._take_state(root)
            # A worker that computed no gradient cannot know that it is sparse.
            gradients = self._trainable()
            largest = self._workers.largest([_sparse_dim(gradient) for gradient in gradients], "sparse")
            for gradient, sparse_dim in zip(gradients, largest):
                gradient.sparse_dim = 0 if self._sparse_as_dense else sparse_dim
        self._world = self._workers.world()

    def _take_state(self, root: int) -> None:
        """What the worker keeps that is farthest, in an elastic job: others may be new, or have missed a step."""
        compressed = [gradient for gradient in self._gradients if gradient.compressed]
        mine = self._steps, self._turn, [gradient.shared_state() for gradient in compressed]
        self._steps, self._turn, states = self._workers.from_worker(root, mine)
        for gradient, state in zip(compressed, states):
            gradient.load_shared_state(state)

    def _resume(self) -> None:
        """Lets every exchange go on that has what it waits for."""
        for exchange, awaited in list(self._waiting.items()):
            while awaited is not None and awaited.done():
                awaited = self._go_on(exchange, awaited)

    @torch.no_grad()
    def _go_on(self, exchange: Generator, awaited) -> object:
        """Resumes an exchange with what it waits for; returns what it waits for next, or None at its end."""
        try:
            self._waiting[exchange] = exchange.send(awaited.result())
            return self._waiting[exchange]
        except StopIteration:
            del self._waiting[exchange]
            return None


def describe(parameters: Iterable[Tuple[str, torch.nn.Parameter]]) -> Dict[str, str]:
    """What all workers must have in common of their models, in words."""
    return {f"parameter {name}": f"{tuple(p.shape)} {p.dtype}" for name, p in parameters}


def _sparse_dim(gradient: PlainGradient) -> int:
    computed = gradient.parameter.grad
    return computed.sparse_dim() if computed is not None and computed.is_sparse else 0
