"""The exchange of certain variables' gradients, the same in every step."""

import functools
import itertools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from horovod_powersgd.buckets import bucket_name, sort_into_buckets
from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor, Traffic
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.tensorflow.agreement import Agreement, describe
from horovod_powersgd.tensorflow.compressed_gradient import CompressedGradient
from horovod_powersgd.tensorflow.finite import all_finite, all_of
from horovod_powersgd.tensorflow.gradient import PlainGradient, Step, shaped
from horovod_powersgd.tensorflow.host_mean import HostMean
from horovod_powersgd.tensorflow.message import Message, nbytes
from horovod_powersgd.tensorflow.order import Order
from horovod_powersgd.tensorflow.senders import Hosts, Senders
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.shared_host import SharedHost
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Number, Workers, not_constant, transportable

Tensor: TypeAlias = tf.Tensor | tf.IndexedSlices

# Counts the exchanges in sessions of each process set, on every worker alike, so that their tensors' names differ.
_numbers: dict[int, Iterator[int]] = defaultdict(itertools.count)


class Exchange:
    """Exchanges the gradients of certain variables. Made by exchange_of (exchanges.py).

    Everything that a step needs is in the graph; Python only builds it. One graph serves all steps and, in an elastic
    job, all generations of workers.
    """

    def __init__(
        self,
        settings: Settings,
        states: Sequence[VariableState],
        groups,
        sparse: tuple[bool, ...],
        workers_class: Callable[..., Workers] = Workers,
    ):
        self._settings, self._config = settings, settings.config
        self.states, self.counters = list(states), states[0].counters
        self._groups, self._sparse = groups, sparse
        description = functools.partial(describe, settings, groups, self.states, sparse)
        name = name_of_agreement = f"powersgd.{next(_numbers[settings.process_set.process_set_id])}"
        self._in_session = not tf.compat.v1.executing_eagerly_outside_functions()
        if not self._in_session:
            # Not a count: a worker may have made one more, to look at a graph for example. Those that do not agree must
            # come to one message.
            name = f"powersgd.{zlib.crc32(repr(description()).encode()):x}"
            name_of_agreement = "powersgd"
        self._workers = workers_class(
            settings.process_set,
            name,
            settings.predivide_factor,
            settings.device,
            settings.device_sparse,
        )
        self._host = SharedHost(self._workers) if self._config.family.hierarchical else None
        self._agreement = Agreement(
            description, self.states, self._workers, self._look, name_of_agreement, self._in_session
        )
        self._order = Order(name, self._in_session)
        # TensorFlow counts how often code is traced, and warns: of a method, it would count that of all exchanges.
        self._function = tf.function(functools.partial(self._build), autograph=False, reduce_retracing=True)

    def __call__(
        self, gradients: Sequence[Tensor], learning_rate=None, snapshots: tuple[Snapshot, ...] = ()
    ) -> list[Tensor]:
        """Their averages (or sums), after compression. The states are kept for the next step where it is finite.

        Args:
            gradients: the variables'.
            learning_rate: of this step, a number, a tensor or a variable; None where it is not known.
            snapshots: to be taken before anything changes.

        Raises:
            RuntimeError: the workers do not agree on the model or the configuration, or one of them has joined where
                something is to be gathered; an InvalidArgumentError with the same message where that is found out
                inside a tf.function.
        """
        rate = None if learning_rate is None else tf.cast(learning_rate, tf.float64)
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph):
            raise RuntimeError(
                "Horovod's operations cannot be compiled by XLA. Set jit_compile=False in model.compile or tf.function."
            )
        if self._in_session:
            return self._build(list(gradients), rate, snapshots)
        try:
            return self._function(list(gradients), rate, snapshots)
        except tf.errors.InvalidArgumentError as error:
            _, ours, message = error.message.partition("ValueError: ")
            if not ours:
                raise
            # What follows is where in Python and in the graph that was found out.
            raise RuntimeError(message.partition("\nTraceback")[0]) from None

    def stats(self) -> CompressionStats:
        """What compression did in the last step and so far."""
        counts = {name: int(variable) for name, variable in self.counters.variables().items()}
        # The last step was one of those, if there was one.
        warming_up = counts["total_bytes_uncompressed"] > 0 and counts["steps"] <= self._config.warmup_steps > 0
        return CompressionStats(
            **counts,
            tensors=tuple(
                self._tensor_stats(state, sparse, warming_up) for state, sparse in zip(self.states, self._sparse)
            ),
            flat_because=None if self._host is None else self._host.flat_because,
        )

    def _tensor_stats(self, state: VariableState, sparse: bool, warming_up: bool) -> TensorStats:
        return TensorStats.of(
            state.name, state.layout, state.config, sparse, warming_up, state.residual, state.decisions()
        )

    def _build(
        self, gradients: list[Tensor], learning_rate: tf.Tensor | None, snapshots: tuple[Snapshot, ...]
    ) -> list[Tensor]:
        """Adds the ops of one step to the graph."""
        graph = tf.compat.v1.get_default_graph()
        # Horovod's ops are known by their names: without a scope, TensorFlow makes them differ in one graph.
        with graph.name_scope(None), tf.control_dependencies([self._prepare(snapshots)]):
            number = tf.identity(self.counters.steps)
            host = None if self._host is None else self._host.now()
            dense = [i for i, is_sparse in enumerate(self._sparse) if not is_sparse]
            sparse = {i: self._exchange_sparse(i, gradients[i]) for i, s in enumerate(self._sparse) if s}
            finite = [all_finite([update.values]) for update, _ in sparse.values()]

            def exchange(states, branch, renews=False, sends_halves=False):
                who = self._workers.number(), self._workers.count(tf.int64)
                step = Step(number, *who, learning_rate, renews, sends_halves, host)
                found = [(i, states[i], gradients[i]) for i in dense]
                return self._exchange_dense(branch, found, step, finite)

            updates, finite, traffic = self._by_branch(number, exchange)
            updates = {**dict(zip(dense, updates)), **{i: update for i, (update, _) in sparse.items()}}
            traffic = _total([traffic, *(of_sparse for _, of_sparse in sparse.values())])
            if self._workers.alone:
                traffic = _total([])
            counted = self._count(finite, traffic, _bytes_uncompressed(gradients))
        updates = [updates[i] for i in range(len(gradients))]
        self._order.end([counted, *tf.nest.flatten(updates, expand_composites=True)])
        if not self._in_session:
            return updates
        with tf.control_dependencies([counted]):
            return tf.nest.map_structure(tf.identity, updates, expand_composites=True)

    def _by_branch(self, number: tf.Tensor, exchange: Callable):
        """The exchange of the branch that the step takes.

        Args:
            number: of the step.
            exchange: of these states' gradients, in a branch of this name.
        """
        return by_branch(self._config, number, functools.partial(exchange, self.states))

    def _count(self, finite: tf.Tensor, traffic: Traffic, bytes_uncompressed: tf.Tensor) -> tf.Operation:
        """What comes after a step."""
        return self.counters.count(finite, traffic, bytes_uncompressed)

    def _look(self) -> tf.Operation:
        """What is found out when the workers agree."""
        return tf.no_op() if self._host is None else self._host.look()

    def _variables(self) -> list[tf.Variable]:
        """All that are kept beside the model's."""
        found = [] if self._host is None else [self._host.hosts]
        kept = itertools.chain(*(state.variables().values() for state in self.states))
        return [self._agreement.agreed, *found, *self.counters.variables().values(), *kept]

    def _prepare(self, snapshots: tuple[Snapshot, ...]) -> tf.Operation:
        """What comes before a step: in a graph of TensorFlow 1 it makes the variables' initial values, so that no job
        has to initialise or restore variables that it does not know of; in the first step of a generation, the
        workers' agreement; and the snapshots."""
        if self._in_session:
            ready = []
            for variable in self._variables():
                there = tf.compat.v1.is_variable_initialized(variable)
                ready.append(tf.cond(there, tf.no_op, functools.partial(_initialise, variable)))
        else:
            ready = [self._order.begin()]
        with tf.control_dependencies(ready):
            agreed = self._agreement.reached()
        with tf.control_dependencies([agreed]):
            return tf.group([snapshot.take() for snapshot in snapshots])

    def _exchange_sparse(self, i: int, slices: tf.IndexedSlices) -> tuple[tf.IndexedSlices, Traffic]:
        """The mean (or sum) of slices, and what was sent for it."""
        dtype = slices.values.dtype
        sent = tf.IndexedSlices(tf.cast(slices.values, transportable(dtype)), slices.indices, slices.dense_shape)
        with tf.control_dependencies([self._workers.all_there(f"sparse.{i}.all_there", None)]):
            mean = self._workers.sparse_mean(sent, f"sparse.{i}")
        values = mean.values * self._workers.count(mean.values.dtype) if self._settings.sum_gradients else mean.values
        update = tf.IndexedSlices(tf.cast(values, dtype), mean.indices, mean.dense_shape)
        return update, Traffic(*(nbytes(part.values) + nbytes(part.indices) for part in (sent, mean)))

    def _exchange_dense(
        self,
        branch: str,
        tensors: Sequence[tuple[int, VariableState, tf.Tensor]],
        step: Step,
        finite: Sequence[tf.Tensor],
    ):
        """Returns the updates, whether the step is finite on all workers, and what was sent.

        Args:
            tensors: the gradients, each with its place and the state that it is exchanged with.
        """
        gradients = []
        for _, state, tensor in tensors:
            compressed = state.layout.compressed and branch != "warmup"
            gradient_class = state.gradient_class if compressed else PlainGradient
            gradients.append(gradient_class(state, tensor))
        groups = self._groups
        if isinstance(groups, list):
            by_index = {i: gradient for (i, _, _), gradient in zip(tensors, gradients)}
            groups = [[by_index[i] for i in group if i in by_index] for group in groups]
        there = functools.cache(lambda: self._all_there(step))
        messages = []
        for i, bucket in enumerate(sort_into_buckets(gradients, groups)):
            messages += self._exchange_bucket(f"{branch}.{bucket_name(i, bucket)}", bucket, step, there)
        updates = [self._update(gradient) for gradient in gradients]
        verdicts = [*finite, *(sender.finite for sender in (*messages, *gradients) if sender.finite is not None)]
        # What is finite as computed can be too large for half precision.
        verdicts += [all_finite([update]) for update in updates if update.dtype == tf.float16]
        finite = all_of(verdicts)
        kept = [assignment for gradient in gradients for assignment in gradient.kept()]

        def commit():
            with tf.control_dependencies([variable.assign(value, read_value=False) for variable, value in kept]):
                return tf.constant(True)

        committed = tf.cond(finite, commit, lambda: tf.constant(False))
        return updates, committed, _total([message.traffic for message in messages])

    def _all_there(self, step: Step) -> tf.Operation:
        """Workers.all_there, before this step gathers. In two levels the workers of a host do."""

        def asked():
            with tf.control_dependencies([self._workers.all_there("all_there", self._config)]):
                return tf.constant(True)

        if step.host is None or not self._config.linear:
            return asked().op
        return tf.cond(step.host.share.parts > 1, asked, lambda: tf.constant(True)).op

    def _exchange_bucket(
        self, name: str, bucket: Sequence[PlainGradient], step: Step, there: Callable[[], tf.Operation]
    ) -> list[Message]:
        """reference.exchange of the gradients of a bucket. What is gathered waits for the op of `there`. Returns what
        was sent."""
        messages: list[Message] = []
        for gradient in bucket:
            gradient.begin(step)
        for i in itertools.count():
            asking = [(gradient, gradient.request) for gradient in bucket if gradient.request is not None]
            if not asking:
                break
            kinds = defaultdict(list)
            # What is averaged as it is travels with the factors, not before them.
            asking = [sender for sender in asking if isinstance(sender[1], HostMean)] or asking
            for gradient, request in asking:
                kinds[_kind_of_message(request)].append((gradient, request))
            for kind, senders in kinds.items():
                message = Message([request.tensors for _, request in senders])
                if kind == "quantized":
                    compressed = [sender for sender, _ in senders if isinstance(sender, CompressedGradient)]
                    rows = [pair for sender in compressed for pair in sender.rows]
                    who = Senders(self._workers) if step.host is None else Hosts(self._workers, step.host)
                    with tf.control_dependencies([there()]):
                        answers = message.averaged_in_8_bits(rows, who, f"{name}.{i}.{kind}")
                elif kind == "gathered":
                    with tf.control_dependencies([there()]):
                        answers = message.gathered(self._workers, f"{name}.{i}.{kind}")
                elif in_host := [request for _, request in senders if isinstance(request, HostMean)]:
                    assert step.host is not None
                    with tf.control_dependencies([there()]):
                        answers = message.averaged_in_host(in_host, step.host, self._workers, f"{name}.{i}.{kind}")
                else:
                    answers = message.averaged(self._workers, f"{name}.{i}.{kind}")
                for (sender, _), answer in zip(senders, answers):
                    sender.receive(answer)
                messages.append(message)
        return messages

    def _update(self, gradient: PlainGradient) -> tf.Tensor:
        """What becomes of the gradient: the mean or the sum."""
        update = gradient.mean
        if self._settings.sum_gradients:
            update *= self._workers.count(update.dtype)
        return tf.cast(shaped(update, gradient.state.layout.shape), gradient.state.variable_dtype)


def by_branch(config: Compressor, number: tf.Tensor, exchange: Callable):
    """The exchange of the branch that a step takes: "warmup", "first" (where the factors of the other steps travel in
    half precision), "renewal", or else "bucket".

    Args:
        config: how gradients are compressed.
        number: of the step.
        exchange: in the branch that it is called with.
    """
    family = config.family

    def ordinary(halves=False):
        if family.refresh_every is None:
            return exchange("bucket", sends_halves=halves)
        renewal = functools.partial(exchange, "renewal", True, halves)
        return tf.cond(family.renews(number), renewal, lambda: exchange("bucket", sends_halves=halves))

    def after_warmup():
        halves = family.sends_halves(number)
        if halves is False:
            return ordinary()
        return tf.cond(halves, lambda: ordinary(True), lambda: exchange("first"))

    if not config.warmup_steps:
        return after_warmup()
    return tf.cond(number < config.warmup_steps, lambda: exchange("warmup"), after_warmup)


def _kind_of_message(request: AllreduceMean | QuantizedMean | Allgather | HostMean) -> str:
    """What the requests have in common that travel together: the dtype's name, with "host." before it where they stay
    in the host; "quantized" or "gathered"."""
    if isinstance(request, QuantizedMean):
        return "quantized"
    if isinstance(request, Allgather):
        return "gathered"
    return f"{'host.' if isinstance(request, HostMean) else ''}{request.tensors[0].dtype.name}"


def _bytes_uncompressed(gradients: Sequence[Tensor]) -> tf.Tensor:
    """What plain allreduce would be handed, int64."""
    total: Number = 0
    for gradient in gradients:
        parts = (gradient.values, gradient.indices) if isinstance(gradient, tf.IndexedSlices) else (gradient,)
        total += sum(nbytes(part) for part in parts)
    return tf.convert_to_tensor(total, tf.int64)


def _total(traffics: Sequence[Traffic]) -> Traffic:
    """Of int64 tensors."""
    return Traffic(*(tf.convert_to_tensor(sum(parts), tf.int64) for parts in zip(Traffic(0, 0), *traffics)))


def _initialise(variable: tf.Variable) -> tf.Operation:
    value = variable.initial_value
    if not variable.shape.is_fully_defined():
        # Constant folding takes the only shape that it sees assigned for that of all the variable's values: it must not
        # see this one.
        value = tf.reshape(value, not_constant(tf.constant(value.shape.as_list(), tf.int32)))
    return tf.group(variable.assign(value, read_value=False))
