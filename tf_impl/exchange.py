"""The exchange of certain variables' gradients, the same in every step."""

import functools
import itertools
import weakref
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet
from tensorflow.python.eager import context
from tensorflow.python.ops import control_flow_util

from horovod_powersgd import PowerSGD
from horovod_powersgd.buckets import bucket_name, sort_into_buckets
from horovod_powersgd.compressors.compressor import AllreduceMean, Compressor, Traffic
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.tensorflow.factored_gradient import FactoredGradient
from horovod_powersgd.tensorflow.gradient import MatrixGradient, PlainGradient, Step
from horovod_powersgd.tensorflow.message import Message, nbytes
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.state import Training, VariableState, plain_name, states_of
from horovod_powersgd.tensorflow.variable import make_variable, native
from horovod_powersgd.tensorflow.workers import Workers, transportable

Tensor = Union[tf.Tensor, tf.IndexedSlices]

# Counts the exchanges in sessions of each process set, on every worker alike, so that their tensors' names differ.
_numbers = defaultdict(itertools.count)
# Those outside of TensorFlow 1's graphs.
_all = weakref.WeakSet()


@dataclass(frozen=True)
class Settings:
    """How gradients are exchanged, by whatever tape or optimizer.

    Attributes:
        config: the same on every worker.
        process_set: Horovod's.
        sum_gradients: deliver the sum over the workers in place of the mean.
        predivide_factor: the part of the division by the number of workers that comes before the sum.
        sparse_as_dense: compress sparse gradients, too.
        groups: Horovod's: their number, or for each group its variables' identities.
        device: of Horovod's ops.
        device_sparse: of those for sparse gradients.
    """

    config: Compressor
    process_set: ProcessSet
    sum_gradients: bool = False
    predivide_factor: float = 1.0
    sparse_as_dense: bool = False
    groups: Union[None, int, Tuple[Tuple[int, ...], ...]] = None
    device: str = ""
    device_sparse: str = ""


class Exchange:
    """Exchanges the gradients of certain variables. Made by exchange_of.

    Everything that a step needs is in the graph; Python only builds it. One graph serves all steps and, in an elastic
    job, all worlds.
    """

    def __init__(self, settings: Settings, states: Sequence[VariableState], groups, sparse: Tuple[bool, ...]):
        self._settings, self._config = settings, settings.config
        self.states, self.clock = list(states), states[0].clock
        self._groups, self._sparse = groups, sparse
        name = name_of_agreement = f"powersgd.{next(_numbers[settings.process_set.process_set_id])}"
        self._in_session = not tf.compat.v1.executing_eagerly_outside_functions()
        if not self._in_session:
            # Not a count: a worker may have made one more, to look at a graph for example. Those that do not agree must
            # come to one message.
            name = f"powersgd.{zlib.crc32(repr(self._description()).encode()):x}"
            name_of_agreement = "powersgd"
        self._name = name
        self._workers = Workers(
            settings.process_set,
            name,
            settings.predivide_factor,
            settings.device,
            settings.device_sparse,
            name_of_agreement,
        )
        self._compressed = FactoredGradient if isinstance(self._config.family, PowerSGD) else MatrixGradient
        # Whether these workers have compared what they are going to do. Not so in a new world.
        self.agreed = make_variable(self._workers.alone)
        self._eagerly = tf.function(self._build, autograph=False, reduce_retracing=True)
        if not self._in_session:
            _all.add(self)

    def __call__(
        self, gradients: Sequence[Tensor], learning_rate=None, snapshots: Tuple[Snapshot, ...] = ()
    ) -> List[Tensor]:
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
        if not tf.executing_eagerly():
            return self._build(list(gradients), rate, snapshots)
        try:
            return self._eagerly(list(gradients), rate, snapshots)
        except tf.errors.InvalidArgumentError as error:
            _, ours, message = error.message.partition("ValueError: ")
            if not ours:
                raise
            # What follows is where in Python and in the graph that was found out.
            raise RuntimeError(message.partition("\nTraceback")[0]) from None

    def stats(self) -> CompressionStats:
        """What compression did in the last step and so far."""
        clock, steps = self.clock, int(self.clock.steps)
        # The last step was one of those, if there was one.
        warming_up = int(clock.total_bytes_uncompressed) > 0 and steps <= self._config.warmup_steps > 0
        return CompressionStats(
            steps=steps,
            bytes_sent=int(clock.bytes_sent),
            bytes_received=int(clock.bytes_received),
            bytes_uncompressed=int(clock.bytes_uncompressed),
            total_bytes_sent=int(clock.total_bytes_sent),
            total_bytes_received=int(clock.total_bytes_received),
            total_bytes_uncompressed=int(clock.total_bytes_uncompressed),
            tensors=tuple(
                TensorStats.of(
                    state.name, state.layout, self._config, sparse, warming_up, state.residual, state.decisions()
                )
                for state, sparse in zip(self.states, self._sparse)
            ),
        )

    def _build(
        self, gradients: List[Tensor], learning_rate: Optional[tf.Tensor], snapshots: Tuple[Snapshot, ...]
    ) -> List[Tensor]:
        """Adds the ops of one step to the graph."""
        graph = tf.compat.v1.get_default_graph()
        if control_flow_util.GraphOrParentsInXlaContext(graph):
            raise RuntimeError(
                "Horovod's operations cannot be compiled by XLA. Set jit_compile=False in model.compile or tf.function."
            )
        # Horovod's ops are known by their names: without a scope, TensorFlow makes them differ in one graph.
        with graph.name_scope(None), tf.control_dependencies([self._prepare(snapshots)]):
            number = tf.identity(self.clock.steps)
            dense = [i for i, is_sparse in enumerate(self._sparse) if not is_sparse]
            sparse = {i: self._exchange_sparse(i, gradients[i]) for i, s in enumerate(self._sparse) if s}
            finite = [tf.reduce_all(tf.math.is_finite(update.values)) for update, _ in sparse.values()]

            def exchange(course, renews=False):
                step = Step(number, self._workers.number(), self._workers.count(tf.int64), learning_rate, renews)
                return self._exchange_dense(course, dense, [gradients[i] for i in dense], step, finite)

            updates, finite, traffic = self._by_course(number, exchange)
            updates = {**dict(zip(dense, updates)), **{i: update for i, (update, _) in sparse.items()}}
            traffic = _total([traffic, *(of_sparse for _, of_sparse in sparse.values())])
            counted = self._count(finite, traffic, gradients)
        updates = [updates[i] for i in range(len(gradients))]
        self._end_turn(self._name, [counted, *tf.nest.flatten(updates, expand_composites=True)])
        if not self._in_session:
            return updates
        with tf.control_dependencies([counted]):
            return tf.nest.map_structure(tf.identity, updates, expand_composites=True)

    def _by_course(self, number: tf.Tensor, exchange: Callable):
        """The exchange that the step takes, of those that there are: in the warm-up, in a renewal, else."""

        def after_warmup():
            family = self._config.family
            if not isinstance(family, PowerSGD) or family.refresh_every is None:
                return exchange("bucket")
            return tf.cond(family.renews(number), lambda: exchange("renewal", True), lambda: exchange("bucket"))

        if not self._config.warmup_steps:
            return after_warmup()
        return tf.cond(number < self._config.warmup_steps, lambda: exchange("warmup"), after_warmup)

    def _prepare(self, snapshots: Tuple[Snapshot, ...]) -> tf.Operation:
        """What comes before a step: in a graph of TensorFlow 1 it makes the variables' initial values, so that no job
        has to initialise or restore variables that it does not know of; in the first step of a world, the workers'
        agreement; and the snapshots."""
        if self._in_session:
            ready = []
            kept = [v for holder in (self.clock, *self.states) for v in holder.variables().values()]
            for variable in (self.agreed, *kept):
                there = tf.compat.v1.is_variable_initialized(variable)
                ready.append(tf.cond(there, tf.no_op, functools.partial(_initialise, variable)))
        else:
            ready = [tf.convert_to_tensor(_turns(self._name))]
        with tf.control_dependencies(ready):
            agreed = tf.constant(True) if self._workers.alone else tf.cond(self.agreed, lambda: True, self._agree)
        with tf.control_dependencies([agreed]):
            return tf.group([snapshot.take() for snapshot in snapshots])

    def _agree(self) -> tf.Tensor:
        names = [state.name for state in self.states]
        done = self._workers.agree(self._description(), names, tf.identity(self.clock.steps), self._take_state)
        with tf.control_dependencies([self._end_turn("powersgd", [done])]):
            with tf.control_dependencies([self.agreed.assign(True, read_value=False)]):
                return tf.constant(True)

    def _description(self) -> Dict[str, str]:
        """What must be the same on all workers."""
        description = {
            "compression": repr(self._config),
            "op": "Sum" if self._settings.sum_gradients else "Average",
            "gradient_predivide_factor": repr(self._settings.predivide_factor),
            "groups": repr(self._groups),
            "sparse_as_dense": repr(self._settings.sparse_as_dense),
        }
        for i, (state, sparse) in enumerate(zip(self.states, self._sparse)):
            kind = f"{state.layout.shape} {state.variable_dtype.name}{' sparse' if sparse else ''}"
            description[f"variable {i}"] = f"{plain_name(state.name)} {kind}"
        return description

    def _take_state(self, root: tf.Tensor) -> tf.Operation:
        """What is the same on every worker, from the worker that is farthest: in an elastic job others may be new, or
        have missed a step. And what random numbers are drawn from, from the first worker, where they call the
        variables differently."""
        ops = []
        variables = [{"steps": self.clock.steps}, *(state.shared_with_keys() for state in self.states)]
        for i, named in enumerate(variables):
            if named:
                tensors = [tf.identity(variable) for variable in named.values()]
                taken = self._workers.taken(root, tensors, f"state.{i}")
                ops += [variable.assign(value, read_value=False) for variable, value in zip(named.values(), taken)]
        return tf.group(*ops)

    def _exchange_sparse(self, i: int, slices: tf.IndexedSlices) -> Tuple[tf.IndexedSlices, Traffic]:
        """The mean (or sum) of slices, and what was sent for it."""
        dtype = slices.values.dtype
        sent = tf.IndexedSlices(tf.cast(slices.values, transportable(dtype)), slices.indices, slices.dense_shape)
        with tf.control_dependencies([self._workers.all_there(f"sparse.{i}.all_there", None)]):
            mean = self._workers.sparse_mean(sent, f"sparse.{i}")
        values = mean.values * self._workers.count(mean.values.dtype) if self._settings.sum_gradients else mean.values
        update = tf.IndexedSlices(tf.cast(values, dtype), mean.indices, mean.dense_shape)
        return update, Traffic(*(nbytes(part.values) + nbytes(part.indices) for part in (sent, mean)))

    def _exchange_dense(
        self, course: str, indices: Sequence[int], tensors: Sequence[tf.Tensor], step: Step, finite: Sequence[tf.Tensor]
    ):
        """Returns the updates, whether the step is finite on all workers, and what was sent."""
        gradients = []
        for i, tensor in zip(indices, tensors):
            compressed = self.states[i].layout.compressed and course != "warmup"
            gradients.append((self._compressed if compressed else PlainGradient)(self.states[i], tensor))
        groups = self._groups
        if isinstance(groups, list):
            by_index = dict(zip(indices, gradients))
            groups = [[by_index[i] for i in group if i in by_index] for group in groups]
        there = functools.cache(lambda: self._workers.all_there("all_there", self._config))
        messages = []
        for i, bucket in enumerate(sort_into_buckets(gradients, groups)):
            messages += self._exchange_bucket(f"{course}.{bucket_name(i, bucket)}", bucket, step, there)
        updates = [self._update(gradient) for gradient in gradients]
        finite = [*finite, *(gradient.finite for gradient in gradients)]
        # What is finite as computed can be too large for half precision.
        finite += [tf.reduce_all(tf.math.is_finite(update)) for update in updates if update.dtype == tf.float16]
        finite = tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)

        def commit():
            with tf.control_dependencies([op for gradient in gradients for op in gradient.commit()]):
                return tf.constant(True)

        committed = tf.cond(finite, commit, lambda: tf.constant(False))
        return updates, committed, _total([message.traffic for message in messages])

    def _exchange_bucket(
        self, name: str, bucket: Sequence[PlainGradient], step: Step, there: Callable[[], tf.Operation]
    ) -> List[Message]:
        """reference.exchange of the gradients of a bucket. What is gathered waits for the op of `there`. Returns what
        was sent."""
        messages = []
        for gradient in bucket:
            gradient.begin(step)
        for i in itertools.count():
            asking = [gradient for gradient in bucket if gradient.request is not None]
            if not asking:
                return messages
            kinds = defaultdict(list)
            for gradient in asking:
                is_mean = isinstance(gradient.request, AllreduceMean)
                kinds[gradient.request.tensors[0].dtype.name if is_mean else "gathered"].append(gradient)
            for kind, senders in kinds.items():
                message = Message([sender.request.tensors for sender in senders])
                if kind == "gathered":
                    with tf.control_dependencies([there()]):
                        answers = message.gathered(self._workers, f"{name}.{i}.{kind}")
                else:
                    answers = message.averaged(self._workers, f"{name}.{i}.{kind}")
                for sender, answer in zip(senders, answers):
                    sender.receive(answer)
                messages.append(message)

    def _update(self, gradient: PlainGradient) -> tf.Tensor:
        """What becomes of the gradient: the mean or the sum."""
        update = gradient.mean
        if self._settings.sum_gradients:
            update *= self._workers.count(update.dtype)
        return tf.cast(tf.reshape(update, gradient.state.layout.shape), gradient.state.variable_dtype)

    def _end_turn(self, name: str, done: Sequence) -> tf.Operation:
        """Lets the next exchange of that name begin after what is done."""
        with tf.control_dependencies(done):
            return tf.no_op() if self._in_session else tf.group(_turns(name).assign_add(1, read_value=False))

    def _count(self, finite: tf.Tensor, traffic: Traffic, gradients: Sequence[Tensor]):
        clock = self.clock
        if self._workers.alone:
            traffic = _total([])
        uncompressed = tf.constant(0, tf.int64)
        for gradient in gradients:
            parts = (gradient.values, gradient.indices) if isinstance(gradient, tf.IndexedSlices) else (gradient,)
            uncompressed += sum(nbytes(part) for part in parts)
        return tf.group(
            clock.steps.assign_add(tf.cast(finite, tf.int64), read_value=False),
            clock.bytes_sent.assign(traffic.sent, read_value=False),
            clock.total_bytes_sent.assign_add(traffic.sent, read_value=False),
            clock.bytes_received.assign(traffic.received, read_value=False),
            clock.total_bytes_received.assign_add(traffic.received, read_value=False),
            clock.bytes_uncompressed.assign(uncompressed, read_value=False),
            clock.total_bytes_uncompressed.assign_add(uncompressed, read_value=False),
        )


@functools.cache
def _turns(name: str) -> tf.Variable:
    """How often a name was used. Exchanges of one name in one function read it when they begin, and change it when they
    end: so that TensorFlow lets one come after the other."""
    return make_variable(np.int64(0))


def _total(traffics: Sequence[Traffic]) -> Traffic:
    zero = tf.constant(0, tf.int64)
    return Traffic(*(sum(parts, zero) for parts in zip(Traffic(zero, zero), *traffics)))


def _initialise(variable: tf.Variable) -> tf.Operation:
    return tf.group(variable.assign(variable.initial_value, read_value=False))


def exchange_of(
    settings: Settings, training: Training, variables: Sequence, gradients: Sequence[Tensor]
) -> Exchange:
    """The exchange of these variables, the same as in the last step where they are.

    Args:
        settings: how to exchange.
        training: whose step it is.
        variables: tf.Variable or Keras 3's, each once.
        gradients: theirs; which of them are sparse must not change.
    """
    states = states_of(variables, settings.config, settings.process_set, training)
    sparse = tuple(isinstance(gradient, tf.IndexedSlices) for gradient in gradients)
    groups: Union[None, int, List[List[int]]] = settings.groups
    if isinstance(groups, tuple):
        places = {id(native(variable)): i for i, variable in enumerate(variables)}
        groups = [[places[identity] for identity in group if identity in places] for group in groups]
    key = (settings, tuple(id(state) for state in states), sparse)
    exchanges = states[0].clock.exchanges
    if key not in exchanges:
        exchanges[key] = Exchange(settings, states, groups, sparse)
    return exchanges[key]


def new_world() -> None:
    """Lets the workers agree again before their next exchange."""
    # Horovod can be initialised inside a graph of TensorFlow 1, too.
    with context.eager_mode():
        for exchange in list(_all):
            exchange.agreed.assign(exchange._workers.alone)
