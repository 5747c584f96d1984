"""The exchange of certain variables' gradients, the same in every step."""

import functools
import itertools
import math
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import List, Sequence, Tuple, Union

import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet
from tensorflow.python.eager import context
from tensorflow.python.ops import control_flow_util

from horovod_powersgd import PowerSGD
from horovod_powersgd.buckets import bucket_name, sort_into_buckets
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.tensorflow.gradient import MatrixGradient, PlainGradient
from horovod_powersgd.tensorflow.state import VariableState, make_variable, native, plain_name, states_of
from horovod_powersgd.tensorflow.workers import Workers, transportable

Tensor = Union[tf.Tensor, tf.IndexedSlices]

# Counts the exchanges of each process set, on every worker alike, so that their tensors' names differ.
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

    config: PowerSGD
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
        number = next(_numbers[settings.process_set.process_set_id])
        self._settings, self._config = settings, settings.config
        self._workers = Workers(
            settings.process_set,
            f"powersgd.{number}",
            settings.predivide_factor,
            settings.device,
            settings.device_sparse,
        )
        self.states, self.clock = list(states), states[0].clock
        self._groups, self._sparse = groups, sparse
        # Whether these workers have compared what they are going to do. Not so in a new world.
        self.agreed = make_variable(self._workers.alone)
        self._eagerly = tf.function(self._build, autograph=False, reduce_retracing=True)
        if tf.compat.v1.executing_eagerly_outside_functions():
            _all.add(self)

    def __call__(self, gradients: Sequence[Tensor]) -> List[Tensor]:
        """Their averages (or sums), after compression. The states are kept for the next step where it is finite.

        Raises:
            RuntimeError: the workers do not agree on the model or the configuration; an InvalidArgumentError with the
                same message where that is found out inside a tf.function.
        """
        if not tf.executing_eagerly():
            return self._build(list(gradients))
        try:
            return self._eagerly(list(gradients))
        except tf.errors.InvalidArgumentError as error:
            _, disagreement, details = error.message.partition("The workers do not agree:")
            if not disagreement:
                raise
            # What follows is where in Python and in the graph that was found out.
            raise RuntimeError(disagreement + details.partition("\nTraceback")[0]) from None

    def stats(self) -> CompressionStats:
        """What compression did in the last step and so far."""
        clock, steps = self.clock, int(self.clock.steps)
        # The last step was one of those, if there was one.
        warming_up = int(clock.total_bytes_uncompressed) > 0 and steps <= self._config.warmup_steps > 0
        return CompressionStats(
            steps=steps,
            bytes_sent=int(clock.bytes_sent),
            bytes_received=int(clock.bytes_sent),
            bytes_uncompressed=int(clock.bytes_uncompressed),
            total_bytes_sent=int(clock.total_bytes_sent),
            total_bytes_received=int(clock.total_bytes_sent),
            total_bytes_uncompressed=int(clock.total_bytes_uncompressed),
            tensors=tuple(
                TensorStats.of(state.name, state.layout, self._config, sparse, warming_up, state.residual)
                for state, sparse in zip(self.states, self._sparse)
            ),
        )

    def _build(self, gradients: List[Tensor]) -> List[Tensor]:
        """Adds the ops of one step to the graph."""
        graph = tf.compat.v1.get_default_graph()
        if control_flow_util.GraphOrParentsInXlaContext(graph):
            raise RuntimeError(
                "Horovod's operations cannot be compiled by XLA. Set jit_compile=False in model.compile or tf.function."
            )
        # Horovod's ops are known by their names: without a scope, TensorFlow makes them differ in one graph.
        with graph.name_scope(None), tf.control_dependencies([self._prepare()]):
            step = tf.identity(self.clock.steps)
            dense = [i for i, is_sparse in enumerate(self._sparse) if not is_sparse]
            sparse = {i: self._exchange_sparse(i, gradients[i]) for i, s in enumerate(self._sparse) if s}
            finite = [tf.reduce_all(tf.math.is_finite(update.values)) for update, _ in sparse.values()]

            def exchange(warming_up):
                return self._exchange_dense(dense, [gradients[i] for i in dense], step, finite, warming_up)

            if self._config.warmup_steps:
                warming_up = step < self._config.warmup_steps
                updates, finite, sent = tf.cond(warming_up, lambda: exchange(True), lambda: exchange(False))
            else:
                updates, finite, sent = exchange(False)
            updates = {**dict(zip(dense, updates)), **{i: update for i, (update, _) in sparse.items()}}
            sparse_bytes = sum((nbytes for _, nbytes in sparse.values()), tf.constant(0, tf.int64))
            counted = self._count(finite, sent, sparse_bytes, [self.states[i] for i in dense])
        updates = [updates[i] for i in range(len(gradients))]
        if tf.compat.v1.executing_eagerly_outside_functions():
            return updates
        with tf.control_dependencies([counted]):
            return tf.nest.map_structure(tf.identity, updates, expand_composites=True)

    def _prepare(self) -> tf.Operation:
        """What comes before a step: in a graph of TensorFlow 1 it makes the variables' initial values, so that no job
        has to initialise or restore variables that it does not know of; and in the first step of a world, the
        workers' agreement."""
        initialised = []
        if not tf.compat.v1.executing_eagerly_outside_functions():
            kept = [kept for holder in (self, self.clock, *self.states) for kept in vars(holder).values()]
            for variable in (v for v in kept if isinstance(v, tf.Variable)):
                there = tf.compat.v1.is_variable_initialized(variable)
                initialised.append(tf.cond(there, tf.no_op, functools.partial(_initialise, variable)))
        with tf.control_dependencies(initialised):
            if self._workers.alone:
                return tf.no_op()
            return tf.cond(self.agreed, lambda: tf.constant(True), self._agree).op

    def _agree(self) -> tf.Tensor:
        agreement = {
            "compression": repr(self._config),
            "op": "Sum" if self._settings.sum_gradients else "Average",
            "gradient_predivide_factor": repr(self._settings.predivide_factor),
            "groups": repr(self._groups),
            "sparse_as_dense": repr(self._settings.sparse_as_dense),
        }
        for i, (state, sparse) in enumerate(zip(self.states, self._sparse)):
            kind = f"{state.layout.shape} {state.variable_dtype.name}{' sparse' if sparse else ''}"
            agreement[f"variable {i}"] = f"{plain_name(state.name)} {kind}"
        names = [state.name for state in self.states]
        done = self._workers.agree(agreement, names, tf.identity(self.clock.steps), self._take_factors)
        with tf.control_dependencies([done]):
            with tf.control_dependencies([self.agreed.assign(True, read_value=False)]):
                return tf.constant(True)

    def _take_factors(self, root: tf.Tensor) -> tf.Operation:
        """The factors of the worker that is farthest, in an elastic job: others may be new, or have missed a step. And
        of the first worker, where they call the variables differently."""
        compressed = [state for state in self.states if state.layout.compressed]
        ops = []
        if compressed:
            keys = self._workers.strings_from(root, [tf.identity(state.random_key) for state in compressed], "keys")
            ops = [state.random_key.assign(keys[i], read_value=False) for i, state in enumerate(compressed)]
        ops += [self.clock.steps.assign(self._workers.from_worker(root, self.clock.steps, "steps"), read_value=False)]
        for i, state in enumerate(compressed):
            factor, name = tf.convert_to_tensor(state.factor), f"factor.{i}"
            if state.factor_is_q is True:
                factor = self._workers.from_worker(root, factor, name)
            else:
                # P or Q, and workers may differ in which: both travel, one of them zero.
                is_q = tf.convert_to_tensor(state.factor_is_q)
                rows, columns = state.layout.matrix_shape
                p = tf.cond(is_q, lambda: tf.zeros((state.layout.amount, rows), state.dtype), lambda: factor)
                q = tf.cond(is_q, lambda: factor, lambda: tf.zeros((state.layout.amount, columns), state.dtype))
                flag = tf.fill((state.layout.amount, 1), tf.cast(is_q, state.dtype))
                flag, p, q = tf.split(
                    self._workers.from_worker(root, tf.concat([flag, p, q], 1), name), [1, rows, columns], 1
                )
                is_q = flag[0, 0] > 0
                ops.append(state.factor_is_q.assign(is_q, read_value=False))
                factor = tf.cond(is_q, lambda: q, lambda: p)
            ops.append(state.factor.assign(factor, read_value=False))
        return tf.group(*ops)

    def _exchange_sparse(self, i: int, slices: tf.IndexedSlices) -> Tuple[tf.IndexedSlices, tf.Tensor]:
        """The mean (or sum) of slices, and the bytes handed to Horovod."""
        dtype = slices.values.dtype
        sent = tf.IndexedSlices(tf.cast(slices.values, transportable(dtype)), slices.indices, slices.dense_shape)
        nbytes = sum(tf.size(part, tf.int64) * part.dtype.size for part in (sent.values, sent.indices))
        mean = self._workers.sparse_mean(sent, f"sparse.{i}")
        values = mean.values * self._factor(mean.values.dtype)
        return tf.IndexedSlices(tf.cast(values, dtype), mean.indices, mean.dense_shape), nbytes

    def _exchange_dense(self, indices: Sequence[int], tensors: Sequence[tf.Tensor], step, finite, warming_up: bool):
        """Returns the updates, whether the step is finite on all workers, and the bytes handed to Horovod."""
        gradients = []
        for i, tensor in zip(indices, tensors):
            compressed = self.states[i].layout.compressed and not warming_up
            gradients.append((MatrixGradient if compressed else PlainGradient)(self.states[i], tensor))
        groups = self._groups
        if isinstance(groups, list):
            by_index = dict(zip(indices, gradients))
            groups = [[by_index[i] for i in group if i in by_index] for group in groups]
        prefix = "warmup" if warming_up else "bucket"
        sent = []
        for i, bucket in enumerate(sort_into_buckets(gradients, groups)):
            sent += self._exchange_bucket(f"{prefix}.{bucket_name(i, bucket)}", bucket, step)
        updates = [gradient.update(self._factor) for gradient in gradients]
        finite = [*finite, *(gradient.finite for gradient in gradients)]
        # What is finite as computed can be too large for half precision.
        finite += [tf.reduce_all(tf.math.is_finite(update)) for update in updates if update.dtype == tf.float16]
        finite = tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)

        def commit():
            with tf.control_dependencies([op for gradient in gradients for op in gradient.commit()]):
                return tf.constant(True)

        committed = tf.cond(finite, commit, lambda: tf.constant(False))
        return updates, committed, sum(sent, tf.constant(0, tf.int64))

    def _exchange_bucket(self, name: str, bucket: Sequence[PlainGradient], step: tf.Tensor) -> List[tf.Tensor]:
        """reference.exchange of the gradients of a bucket. Returns the bytes of each message."""
        sent = []
        matrices = [gradient for gradient in bucket if gradient.compressed]
        for gradient in bucket:
            gradient.begin(step)
        for half_step in range(self._config.num_iters_per_step if matrices else 1):
            senders = matrices if half_step else bucket
            parts = [gradient.send() for gradient in senders]
            sizes = [part.shape[0] if part.shape[0] is not None else tf.size(part) for part in parts]
            flat = tf.concat(parts, 0) if len(parts) > 1 else parts[0]
            mean = self._workers.mean(flat, f"{name}.{half_step}")
            for gradient, part in zip(senders, tf.split(mean, sizes) if len(parts) > 1 else [mean]):
                gradient.receive(part)
            sent.append(tf.size(flat, tf.int64) * flat.dtype.size)
        return sent

    def _factor(self, dtype: tf.DType) -> tf.Tensor:
        """What means are multiplied by in the end."""
        return self._workers.count(dtype) if self._settings.sum_gradients else tf.ones((), dtype)

    def _count(self, finite: tf.Tensor, sent: tf.Tensor, sparse_bytes: tf.Tensor, dense: Sequence[VariableState]):
        clock = self.clock
        uncompressed = sum(math.prod(s.layout.shape) * s.variable_dtype.size for s in dense) + sparse_bytes
        sent = tf.zeros((), tf.int64) if self._workers.alone else sent + sparse_bytes
        return tf.group(
            clock.steps.assign_add(tf.cast(finite, tf.int64), read_value=False),
            clock.bytes_sent.assign(sent, read_value=False),
            clock.total_bytes_sent.assign_add(sent, read_value=False),
            clock.bytes_uncompressed.assign(uncompressed, read_value=False),
            clock.total_bytes_uncompressed.assign_add(uncompressed, read_value=False),
        )


def _initialise(variable: tf.Variable) -> tf.Operation:
    return tf.group(variable.assign(variable.initial_value, read_value=False))


def exchange_of(settings: Settings, variables: Sequence, gradients: Sequence[Tensor]) -> Exchange:
    """The exchange of these variables, the same as in the last step where they are.

    Args:
        settings: how to exchange.
        variables: tf.Variable or Keras 3's, each once.
        gradients: theirs; which of them are sparse must not change.
    """
    states = states_of(variables, settings.config, settings.process_set)
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
