"""The exchange of one optimizer's gradients, step by step, while backward computes them."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_powersgd.agreement import Description
from horovod_powersgd.checkpoint import Share
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import Host, host_key, host_of
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.torch import agreement as agreement_of_workers
from horovod_powersgd.torch.byte_counters import ByteCounters
from horovod_powersgd.torch.control_messages import from_worker, largest
from horovod_powersgd.torch.exchange_driver import ExchangeDriver
from horovod_powersgd.torch.fast_paths import make_buckets
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.gradient import PlainGradient, mark_overlaps
from horovod_powersgd.torch.gradient_set import GradientSet
from horovod_powersgd.torch.gradient_watch import GradientWatch
from horovod_powersgd.torch.host_sums import OWN
from horovod_powersgd.torch.model_description import describe, sparse_dim
from horovod_powersgd.torch.peers import Peers, peers_of
from horovod_powersgd.torch.step import Step, Verdict
from horovod_powersgd.torch.streams import Streams
from horovod_powersgd.torch.workers import Workers


class Engine:
    """Exchanges an optimizer's gradients, a step's at a time.

    An exchange that has ended is pending until its step is taken (commit) or not (discard).

    Args:
        config: the same on every worker.
        workers: that take part.
        agreement: what else must be the same on every worker, in words.
        sum_gradients: deliver the sum over the workers in place of the mean.
        groups: Horovod's, see make_buckets.
        sparse_as_dense: compress sparse gradients, too.
        learning_rates: gives those of the parameters, as far as they are known.

    Attributes:
        steps: that were exchanged with finite results, and taken.
        generation: of the workers that it has agreed with.
    """

    uncompressed = False

    def __init__(
        self,
        config: Compressor,
        workers: Workers,
        agreement: Description = MappingProxyType({}),
        sum_gradients: bool = False,
        groups: None | int | Sequence = None,
        sparse_as_dense: bool = False,
        learning_rates: Callable[[], Mapping[torch.nn.Parameter, float]] = dict,
    ):
        self._learning_rates = learning_rates
        self.workers, self._agreement = workers, agreement
        self._sum_gradients, self._groups = sum_gradients, groups
        self._gradients = GradientSet(config, sparse_as_dense)
        # Those of all compressors: Auto goes over from one's to another's.
        self._gradient_sets = [self._gradients]
        self._bucketed: tuple = ()
        # This worker's host where the exchange has two levels, the workers there if they can read each other's memory,
        # and why it has one level where two were asked for.
        self._host: Host | None = None
        self._peers: Peers | None = None
        self._flat_because: str | None = None
        self._warming_up = False
        # Names of those that are averaged as they are, whatever the compressor would do: Auto's choice.
        self._as_they_are: set[str] = set()
        self._streams = Streams()
        self._exchanges = ExchangeDriver(self._streams)
        self._arriving: dict[torch.nn.Parameter, PlainGradient] = {}
        # Those whose gradients were there before the workers had agreed.
        self._early: set[torch.nn.Parameter] = set()
        # Of the gradients as they were when they arrived, and then as the exchange has left them.
        self._watch = GradientWatch()
        # The gradients of the exchange that has ended, and whether it was finite.
        self._pending: tuple[Sequence[PlainGradient], bool] | None = None
        # Why the exchange of this step failed, in words and whether a worker was lost, and how often that has happened
        # since the workers agreed.
        self._failure: tuple[str, bool] | None = None
        self._failures = 0
        self.generation: object = None
        self._scaler: torch.amp.GradScaler | None = None
        self._unscaled: float | torch.Tensor = 1.0
        # Backward has a thread for each device.
        self._lock = threading.RLock()
        self.steps, self._parity = 0, False
        self._byte_counters = ByteCounters()
        agreement_of_workers.enter(self)

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Takes in a parameter, between two steps."""
        for gradient_set in self._gradient_sets:
            gradient_set.add(name, parameter)
        if self._host is not None:
            self.generation = None  # so that the workers of a host find each other again, and share this one, too

    def take_over(self, other: "Engine") -> None:
        """Goes on where another engine ends, if it is one of the same parameters and configuration."""
        if self._gradients.take_over(other._gradients):
            self.steps, self._parity = other.steps, other._parity

    def follow_loss_scale(self, scaler) -> None:
        """Asks the scaler (get_scale) for the loss scale in each step: gradients and memory are in that scale."""
        if self._scaler is None and self._pending:
            # Nobody had told of it when the step began.
            for gradient in self._pending[0]:
                gradient.scaled_by(scaler.get_scale())
        self._scaler = scaler

    def unscaled(self, factor: torch.Tensor) -> None:
        """Takes note that the updates are multiplied by a scalar, which is no clipping."""
        self._unscaled = factor

    def arrived(self, parameter: torch.nn.Parameter, incoming: torch.Tensor | None = None) -> None:
        """Takes in a gradient that backward has finished, and lets the exchanges go on as far as they can.

        Args:
            parameter: whose gradient it is.
            incoming: what backward has handed over, while the hook runs that was called with it.
        """
        with self._lock:
            if parameter.grad is None:
                return  # a hook of the user's has taken it away
            # The first exchange of a generation waits for finish: workers may call backward in another order than step.
            if self.generation is not generation():
                self.discard()
                self._watch.note(parameter, incoming)
                self._early.add(parameter)
                return
            try:
                if not self._arriving:
                    self._begin()
                gradient = self._arriving.get(parameter)
                if gradient is None:
                    raise RuntimeError(
                        f"{self._name_of(parameter)} has become trainable in the middle of a step, whose exchange does "
                        "not know of it: freeze and thaw parameters between steps, on all workers"
                    )
                if parameter not in self._early:
                    self._watch.note(parameter, incoming)
                self._streams.wait_for_current(parameter.device)
                gradient.arrived, gradient.incoming = True, incoming
                self._exchanges.resume_with(gradient)
                gradient.incoming = None
            except BaseException as error:  # Ctrl-C, too
                self._fail(error)
                raise

    def note(self, parameter: torch.nn.Parameter) -> None:
        """Notes a gradient as it is: from now on nobody is to change it before the exchange has ended."""
        self._watch.note(parameter)

    @property
    def pending(self) -> bool:
        """Whether an exchange has ended whose step was neither taken nor discarded."""
        return self._pending is not None

    @property
    def replaced(self) -> bool:
        """Whether there are other gradients than those of the exchange that has ended."""
        return self._pending is not None and any(
            self._watch.is_replaced(gradient.parameter) for gradient in self._pending[0]
        )

    def finish(self, undoable: bool) -> None:
        """Completes the exchange: afterwards the updates stand in the gradients, and it is pending.

        A gradient that has not arrived takes part as it is, and as zeros where there is none, because another worker
        may have computed it.

        Args:
            undoable: whether the step may still be discarded. Otherwise it is to be committed at once; that spares
                memory of the gradients' size.

        Raises:
            HorovodInternalError: a worker was lost. Memories and factors are as they were before the step.
            RuntimeError: the workers do not agree on the model or the configuration; or a gradient was changed while it
                was exchanged; or the exchange has failed before.
        """
        if self.generation is generation():
            self._refuse_failed()
        else:
            self._agree()
        try:
            if not self._arriving:
                self._begin()
            for parameter, gradient in self._arriving.items():
                if not gradient.arrived:
                    self._streams.wait_for_current(parameter.device)
                    gradient.make_zero()
                    if parameter not in self._early:
                        self._watch.note(parameter)
                gradient.arrived = True
            changed = self._watch.changes(self._arriving.values())
            self._exchanges.drive(self._resume_others)
            if changed:
                raise RuntimeError(changed)
            mark_overlaps([(g, grad) for g in self._arriving.values() if (grad := g.borrowed) is not None])
            self._step.undoable, self._step.verdict.called_for, self._unscaled = undoable, True, 1.0
            self._exchanges.resume()
            self._watch.clear()
            for parameter in self._arriving if undoable else ():
                self._watch.note(parameter)
            uncompressed = sum(gradient.uncompressed_bytes() for gradient in self._arriving.values())
            self._byte_counters.count(self._step.sent, self._step.received, uncompressed)
            with self._streams.current():
                self._pending = tuple(self._arriving.values()), self._step.verdict.result()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.reset()

    def commit(self) -> None:
        """Keeps what the next step needs, of the exchange that has ended: its step is taken."""
        if self._pending is None:
            return
        (gradients, finite), self._pending = self._pending, None
        if finite:
            self.steps += 1
            factors = self._watch.clipping(gradients, self._unscaled) if gradients and self._step.undoable else {}
            for gradient in gradients:
                gradient.commit(factors.get(gradient))
        self._watch.clear()

    def discard(self) -> None:
        """Leaves memories, factors and steps as they were before the exchange that has ended: its step is not taken."""
        if self._pending is not None:
            for gradient in self._pending[0]:
                gradient.discard()
            self._pending = None
            self._watch.clear()
        self._failure = None

    def reset(self) -> None:
        """Forgets an exchange that was begun."""
        for gradient in self._arriving.values():
            gradient.arrived, gradient.incoming = False, None
        self._arriving = {}
        self._exchanges.forget()
        self._early.clear()
        self._streams.release()

    def stats(self) -> CompressionStats:
        """What compression did in the last step and so far."""
        return CompressionStats(
            steps=self.steps + bool(self._pending and self._pending[1]),
            **vars(self._byte_counters),
            tensors=self._tensor_stats(),
            flat_because=self._flat_because,
        )

    def state_dict(self) -> dict[str, object]:
        """What this worker has to keep for the exchange to go on where it is: tensors, numbers and strings."""
        return self._gradients.state_dict(self.workers, self.steps)

    def load_state_dict(self, states: Mapping | Iterable[Mapping]) -> None:
        """Goes on where the state was made.

        Args:
            states: this worker's state, or those of all workers in their order. With another number of workers than
                the state is from, all are needed: the memories are shared out so that their mean stays.

        Raises:
            ValueError: the state is of another model or configuration, or does not serve this number of workers.
        """
        share = self._gradients.share_of(states, self.workers)
        self.discard()
        self.steps = share.steps
        self._load(share)

    def _load(self, share: Share) -> None:
        """Lets gradients go on where this worker's share was saved."""
        self._gradients.load(share)

    @property
    def _config(self) -> Compressor:
        return self._gradients.config

    def _tensor_stats(self) -> tuple[TensorStats, ...]:
        return self._gradients.stats(self._warming_up)

    def _trainable(self) -> tuple[PlainGradient, ...]:
        """The gradients of the next step."""
        return self._gradients.of_step(self.steps, self._as_they_are)

    def _begin(self) -> None:
        self.discard()
        gradients = self._trainable()
        self._warming_up = self.steps < self._config.warmup_steps
        if gradients != self._bucketed:
            two_levels = self._host, self._peers
            self._buckets = make_buckets(gradients, self.workers, self._config, self._groups, *two_levels)
            self._bucketed = gradients
        self._arriving = {gradient.parameter: gradient for gradient in gradients}
        self._parity = not self._parity
        self._step = Step(
            number=self._number_of_step(),
            parity=self._parity,
            scale=1.0 if self._scaler is None else self._scaler.get_scale(),
            factor=self.workers.count if self._sum_gradients else 1,
            rates=self._learning_rates(),
            verdict=Verdict(len(self._buckets)),
            workers=self.workers,
        )
        for bucket in self._buckets:
            self._exchanges.begin(bucket.exchange(self._step))

    def _number_of_step(self) -> int:
        """How many steps came before the next one, with its compressor."""
        return self.steps

    def _agree(self) -> None:
        if self.workers.count > 1:
            agreement_of_workers.agree(self)
        else:
            self.generation, self._flat_because = generation(), None
            self.share_host(None)

    def names(self) -> list[str]:
        """Of the parameters."""
        return [gradient.name for gradient in self._gradients]

    def description(self) -> Description:
        """What must be the same on every worker, in words."""
        return {**self._agreement, **describe([(g.name, g.parameter) for g in self._trainable()])}

    def agreed(self, root: int | None, by_name: bool) -> None:
        """Before the first exchange of these workers: all run the same training, and hold the same factors.

        Args:
            root: the worker with the most completed steps, in an elastic job, or after some have missed some: all take
                its shared state. None where all are new.
            by_name: whether the workers have the parameters in different orders.
        """
        if by_name:
            for gradient_set in self._gradient_sets:
                gradient_set.sort()
        self._begin_generation(root)
        if self._config.family.hierarchical:
            self._look_for_hosts()
        # A worker that computed no gradient cannot know that it is sparse.
        gradients = self._trainable()
        found = largest(self.workers, [sparse_dim(gradient.parameter) for gradient in gradients], "sparse")
        dims = {gradient.name: dim for gradient, dim in zip(gradients, found)}
        for gradient_set in self._gradient_sets:
            gradient_set.set_sparse_dims(dims)
        self.generation, self._failures, self._bucketed = generation(), 0, ()
        for parameter in tuple(self._early):
            if parameter.requires_grad:
                self.arrived(parameter)

    def _look_for_hosts(self) -> None:
        """Decides, on all workers alike, whether the exchange has two levels."""
        keys = [0] * self.workers.count
        keys[self.workers.index] = host_key()
        found = host_of(largest(self.workers, keys, "hosts"), self.workers.index)
        self._flat_because = found if isinstance(found, str) else None
        host = None if isinstance(found, str) else found
        on_processor = all(gradient.parameter.device.type == "cpu" for gradient in self._gradients)
        names = [prefix + name for name in self.names() for prefix in ("", OWN)]
        self.share_host(host, peers_of(self.workers, host, names, on_processor))

    def share_host(self, host: Host | None, peers: Peers | None = None) -> None:
        """Between two steps: lets the exchange have two levels, or one where the host is None."""
        self._host, self._peers, self._bucketed = host, peers, ()
        self._gradients.share_host(host)

    def _begin_generation(self, root: int | None) -> None:
        """Takes the shared state of the root, if there is one."""
        if root is not None:
            mine = self.steps, self._parity, self._gradients.shared_state()
            self.steps, self._parity, states = from_worker(self.workers, root, mine)
            self._gradients.load_shared_state(states)

    def _resume_others(self) -> bool:
        """Lets the exchanges of other engines go on, whose step other workers may have come to first; whether there are
        any."""
        engines = [engine for engine in agreement_of_workers.parties() if isinstance(engine, Engine)]
        others = [engine for engine in engines if engine is not self and engine._exchanges.busy]
        for other in others:
            other._resume_aside()
        return bool(others)

    def _resume_aside(self) -> None:
        """Lets the exchanges go on while another engine waits; an error is this one's finish to tell."""
        with self._lock:
            try:
                self._exchanges.resume()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Drops a step whose exchange has failed: some of its gradients are local ones, others are averages."""
        if not self._arriving:
            return
        for parameter in self._arriving:
            parameter.grad = None
        self.reset()
        self._watch.clear()
        self._failure = f"{type(error).__name__}: {error}", isinstance(error, HorovodInternalError)
        # Messages that other workers have sent, or this one, must not meet those of the next step.
        self._failures += 1
        self.workers.prefix = f"{self.workers.prefix.partition('!')[0]}!{self._failures}"

    def _refuse_failed(self) -> None:
        if self._failure is None:
            return
        words, lost_worker = self._failure
        if lost_worker:
            raise HorovodInternalError(words)
        raise RuntimeError(
            f"The exchange of this step has failed ({words}), and its gradients are lost: call zero_grad() and go on "
            "with the next batch, on all workers; where it has failed on some only, end the job, since the others wait"
        )

    def _name_of(self, parameter: torch.nn.Parameter) -> str:
        return next((gradient.name for gradient in self._gradients if gradient.parameter is parameter), "a parameter")
