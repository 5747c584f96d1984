"""Gradients in, averages out: what a tape and an optimizer do with all the workers' gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import horovod.tensorflow as horovod
import tensorflow as tf
from horovod.tensorflow.mpi_ops import Average, ProcessSet, Sum

from horovod_powersgd.arguments import check_op, compressor_of
from horovod_powersgd.tensorflow.clipping import clip_memory
from horovod_powersgd.tensorflow.compression_state import load, saved
from horovod_powersgd.tensorflow.exchange import Exchange
from horovod_powersgd.tensorflow.exchanges import exchange_of
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.training import Training, state_in, states_of
from horovod_powersgd.tensorflow.variable import native
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Workers, transportable


class Reduction:
    """Averages gradients over the workers, by a compressor or by Horovod's own compressions.

    Args:
        compression: a compressor, a generator function, or a Horovod compression.
        name: prefix of the operations.
        (the others): of Horovod's DistributedGradientTape.
        training: that its steps belong to; None: a new one, which begins with nothing in memory.

    Attributes:
        compressor: None for Horovod's own compressions.
        exchange: the compressor's last one.
        training: may be set to another reduction's, whose training goes on.
        discardable: whether steps are taken so that they can be discarded.

    Raises:
        TypeError: compression is none of these.
        ValueError: a compressor with an op that is neither hvd.Average nor hvd.Sum.
    """

    def __init__(
        self,
        compression,
        name: str,
        device_dense: str,
        device_sparse: str,
        sparse_as_dense: bool,
        op: int,
        gradient_predivide_factor: float,
        groups,
        process_set: ProcessSet,
        training: Training | None = None,
    ):
        self.compressor = compressor_of(compression)
        self.training = training or Training()
        self.discardable = False
        self._snapshots: list[Snapshot] = []
        self.exchange: Exchange | None = None
        self._settings: Settings | None = None
        self._process_set, self._sparse_as_dense = process_set, sparse_as_dense
        groups = native_groups(groups)
        check_op(self.compressor, op in (Average, Sum))
        if self.compressor is not None:
            if isinstance(groups, list):
                self._grouped = groups  # their identities count as long as they live
                groups = tuple(tuple(id(variable) for variable in group) for group in groups)
            self._settings = Settings(
                self.compressor,
                process_set,
                sum_gradients=op == Sum,
                predivide_factor=gradient_predivide_factor,
                sparse_as_dense=sparse_as_dense,
                groups=groups,
                device=device_dense,
                device_sparse=device_sparse,
            )
            compression, groups = horovod.Compression.none, None
        self._horovods = horovod._make_allreduce_grads_fn(
            name,
            device_dense,
            device_sparse,
            compression,
            sparse_as_dense,
            op,
            gradient_predivide_factor,
            groups,
            process_set,
        )

    def __call__(
        self, gradients: Sequence, variables: Sequence, use_generic_names: bool = False, learning_rate=None
    ) -> list:
        """The averages, in the same order; None where there is no gradient.

        Args:
            gradients: tf.Tensor, tf.IndexedSlices or None.
            variables: what they are the gradients of: tf.Variable, Keras 3 variables, or tensors, which Horovod
                averages uncompressed.
            use_generic_names: as in Horovod, which then names the gradients by their places.
            learning_rate: of this step, for Accordion: a number, a tensor or a variable; None where it is not known.
        """
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if not places or not self._process_set.included():
            return list(gradients)
        compressed = [i for i in places if self._settings is not None and _is_static(native(variables[i]))]
        plain = [i for i in places if i not in compressed]
        updates = self._compressed(_at(compressed, gradients), _at(compressed, variables), learning_rate)
        means = self._plain(_at(plain, gradients), _at(plain, variables), use_generic_names)
        found = dict(zip(compressed + plain, [*updates, *means]))
        return [found.get(i) for i in range(len(gradients))]

    def of_shared(
        self,
        gradients: Sequence,
        variables: Sequence,
        local: set,
        scale_local: bool,
        use_generic_names: bool = False,
        learning_rate=None,
    ) -> list:
        """The averages for the variables that the workers share; a worker's own keep their gradients.

        Args:
            gradients, variables, use_generic_names, learning_rate: as for a call.
            local: references (ref()) of the variables that are this worker's own.
            scale_local: divide their gradients by the number of workers.
        """
        found = list(gradients)
        shared = [i for i, variable in enumerate(variables) if native(variable).ref() not in local]
        means = self(_at(shared, gradients), _at(shared, variables), use_generic_names, learning_rate)
        for i, mean in zip(shared, means):
            found[i] = mean
        if scale_local and len(shared) < len(found):
            count = Workers(self._process_set, "").count(tf.float32)
            for i in {*range(len(found))}.difference(shared):
                found[i] = _map(lambda values: values / tf.cast(count, values.dtype), found[i])
        return found

    def begin(self) -> None:
        """What is exchanged from now on is one step."""
        self._snapshots = []

    def discard(self) -> None:
        """Lets what has been exchanged since begin() leave no trace. Adds ops to the graph that is being built, if one
        is."""
        for snapshot in self._snapshots:
            snapshot.restore()

    def follow_clipping(self, variables: Sequence, factors: Sequence) -> None:
        """Lets the memories know that the last averages are clipped, so that what is cut off a bad batch's does not
        come back from them (horovod_powersgd.clipping). Adds ops to the graph that is being built, if one is.

        Args:
            variables: some or all, of whatever kind.
            factors: what the average of each is multiplied by, scalars of any dtype, 0 or more; not finite where the
                average is not.
        """
        if self.compressor is None:
            return
        for variable, factor in zip(variables, factors):
            state = state_in(self.training, variable, self.compressor, self._process_set)
            if state is not None and state.memory is not None:
                kept = self.discardable and state.snapshot in self._snapshots
                clip_memory(state, tf.cast(factor, tf.float64), state.snapshot if kept else None)

    def state_dict(self, variables: Sequence) -> dict[str, object]:
        """hvd.compression_state_dict, of this training.

        Raises:
            RuntimeError: there are no variables, because none has been compressed yet.
        """
        if not variables:
            raise RuntimeError("nothing has been compressed yet")
        return saved(self._states(variables))

    def load_state_dict(self, states: Mapping | Iterable[Mapping], variables: Sequence) -> None:
        """hvd.load_compression_state_dict, into this training."""
        load(states, lambda first: self._states(variables))

    def _states(self, variables: Sequence) -> list[VariableState]:
        assert self.compressor is not None
        return states_of(variables, self.compressor, self._process_set, self.training)

    def _compressed(self, gradients: Sequence, variables: Sequence, learning_rate) -> Sequence:
        if not gradients:
            return []
        if self._sparse_as_dense:
            gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        # A variable that is given twice has one gradient, and one memory.
        places = {id(native(variable)): i for i, variable in enumerate(variables)}
        gradients, once = _at(places.values(), gradients), _at(places.values(), variables)
        assert self._settings is not None
        self.exchange = exchange_of(self._settings, self.training, once, gradients)
        new = []
        if self.discardable:
            kept = [self.exchange.counters.snapshot, *(state.snapshot for state in self.exchange.states)]
            new = [snapshot for snapshot in kept if snapshot not in self._snapshots]
            self._snapshots += new
        updates = dict(zip(places, self.exchange(gradients, learning_rate, tuple(new))))
        return [updates[id(native(variable))] for variable in variables]

    def _plain(self, gradients: Sequence, variables: Sequence, use_generic_names: bool) -> Sequence:
        if not gradients:
            return []
        dtypes = [gradient.dtype for gradient in gradients]
        sent = [_cast(gradient, transportable(dtype)) for gradient, dtype in zip(gradients, dtypes)]
        means = self._horovods(sent, [native(variable) for variable in variables], use_generic_names)
        return [_cast(mean, dtype) for mean, dtype in zip(means, dtypes)]


def scaled(gradients: Sequence, scale) -> list:
    """The gradients times `scale`, a number or a variable; None: as they are."""
    if scale is None:
        return list(gradients)
    return [_map(lambda values: values * tf.cast(scale, values.dtype), gradient) for gradient in gradients]


def unscaled(gradients: Sequence, scale) -> list:
    """The gradients divided by `scale`, a number or a variable; None: as they are."""
    return scaled(gradients, None if scale is None else 1 / tf.cast(scale, tf.float64))


def _at(places: Iterable[int], items: Sequence) -> list:
    """The items at these places."""
    return [items[i] for i in places]


def native_groups(groups):
    """Horovod's groups, with the tf.Variable of each Keras 3 variable."""
    if not isinstance(groups, list):
        return groups
    return [[native(variable) for variable in group] for group in groups]


def _is_static(variable) -> bool:
    """Whether it is a variable of real numbers whose shape is known: others have no state, and are not compressed."""
    return isinstance(variable, tf.Variable) and variable.shape.is_fully_defined() and variable.dtype.is_floating


def _cast(gradient, dtype: tf.DType):
    return tf.cast(gradient, dtype) if gradient.dtype != dtype else gradient


def _map(function: Callable, gradient):
    """The function of a gradient's values; None of None."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return None if gradient is None else function(gradient)
