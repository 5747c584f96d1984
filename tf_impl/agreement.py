"""The workers' agreement, in ops: before their first exchange, all workers know that they run the same training."""

import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops
from horovod.tensorflow.mpi_ops import Max, Sum
from tensorflow.python.eager import context

from horovod_powersgd.agreement import MOST_WORKERS, Description, ballot, configuration, differences
from horovod_powersgd.tensorflow.order import Order
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.variable import make_variable, plain_name
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Workers

# Those outside of TensorFlow 1's graphs.
_all: "weakref.WeakSet[Agreement]" = weakref.WeakSet()


def new_generation() -> None:
    """Lets the workers agree again before their next exchange: after hvd.init() and hvd.join()."""
    # Horovod can be initialised inside a graph of TensorFlow 1, too.
    with context.eager_mode():
        for agreement in list(_all):
            agreement.begin_again()


def describe(settings: Settings, groups, states: Sequence[VariableState], sparse: Sequence[bool]) -> Description:
    """What must be the same on all workers, in words.

    Args:
        settings: of the exchange.
        groups: Horovod's, by the places of variables.
        states: of the variables.
        sparse: whether the gradient of each is sparse.
    """
    description = configuration(
        repr(settings.config), settings.sum_gradients, settings.predivide_factor, groups, settings.sparse_as_dense
    )
    for i, (state, is_sparse) in enumerate(zip(states, sparse)):
        kind = f"{state.layout.shape} {state.variable_dtype.name}{' sparse' if is_sparse else ''}"
        description[f"variable {i}"] = f"{plain_name(state.name)} {kind}"
    return description


class Agreement:
    """One exchange's agreement. Every method but the last adds ops to the graph that is being built.

    Args:
        description: gives what must be the same on all workers.
        states: of the variables.
        workers: that exchange.
        look: adds what is to be found out then.
        prefix: of the messages' names; the same for workers that may not agree.
        in_session: whether it is in a graph of TensorFlow 1.

    Attributes:
        agreed: boolean variable: whether these workers have compared what they are going to do. False in a new
            generation of workers.
    """

    def __init__(
        self,
        description: Callable[[], Description],
        states: Sequence[VariableState],
        workers: Workers,
        look: Callable[[], tf.Operation],
        prefix: str,
        in_session: bool,
    ):
        self._description, self._states, self._workers, self._look = description, states, workers, look
        self._before = replace(workers, prefix=prefix)
        self._order = Order("powersgd", in_session)
        self.agreed = make_variable(workers.alone)
        if not in_session:
            _all.add(self)

    def reached(self) -> tf.Tensor:
        """True, once the workers agree."""
        return tf.constant(True) if self._workers.alone else tf.cond(self.agreed, lambda: True, self._reach)

    def _reach(self) -> tf.Tensor:
        with tf.control_dependencies([self._compare()]):
            looked = self._look()
        with tf.control_dependencies([self._order.end([looked])]):
            with tf.control_dependencies([self.agreed.assign(True, read_value=False)]):
                return tf.constant(True)

    def _compare(self) -> tf.Operation:
        """Checks that all workers have the same description, and lets them take the shared state of the worker with the
        most completed steps, where one has exchanged anything or the names differ. Costs one small allreduce.

        Returns:
            An op. It fails with an InvalidArgumentError on every worker, that says what differs between whom.
        """
        description, steps = self._description(), tf.identity(self._states[0].counters.steps)
        described, named = ballot(description), ballot({"names": "\n".join(state.name for state in self._states)})
        place = (steps + 1) * MOST_WORKERS - tf.cast(mpi_ops.rank_op(), tf.int64)
        mine = tf.concat([tf.constant(described + named, tf.int64), [place]], 0)
        largest = self._before.allreduce(mine, "agreement", Max)
        equal = tf.equal(largest, mine)
        same, alike = tf.reduce_all(equal[: len(described)]), tf.reduce_all(equal[len(described) : -1])
        checked = tf.cond(same, lambda: True, lambda: self._refuse(description))
        with tf.control_dependencies([checked]):
            place = tf.identity(largest[-1])

        def take():
            with tf.control_dependencies([self._take_state(tf.math.floormod(-place, MOST_WORKERS))]):
                return tf.constant(True)

        return tf.cond((place > MOST_WORKERS) | ~alike, take, lambda: True).op

    def _refuse(self, description: Description) -> tf.Tensor:
        def refuse(sizes, pickled):
            parts = np.split(pickled, np.cumsum(sizes)[:-1])
            # As a ValueError it becomes an InvalidArgumentError, which no elastic job takes for a lost worker.
            raise ValueError(f"The workers do not agree:\n{differences([pickle.loads(p.tobytes()) for p in parts])}")

        mine = np.frombuffer(pickle.dumps(description), np.uint8)
        sizes = self._before.allgather(tf.constant([len(mine)]), "disagreement.sizes")
        pickled = self._before.allgather(tf.constant(mine), "disagreement.descriptions")
        refused = tf.numpy_function(refuse, [sizes, pickled], tf.bool)
        refused.set_shape(())
        return refused

    def _take_state(self, root: tf.Tensor) -> tf.Operation:
        """Takes what is the same on every worker from the one with the most completed steps: in an elastic job others
        may be new, or have missed a step. Where the workers call the variables differently, they draw their random
        numbers by the names of the first worker."""
        named = self._states[0].counters.shared(), *(state.shared_with_keys() for state in self._states)
        variables = [variable for some in named for variable in some.values()]
        taken = self._taken(root, [tf.identity(variable) for variable in variables])
        return tf.group(*(variable.assign(value, read_value=False) for variable, value in zip(variables, taken)))

    def _taken(self, root: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The root's tensors, where the root, a global number, is known only when the graph runs. Their shapes can
        differ among the workers. By allreduce, which a worker may have joined."""

        def pack(root, worker, *arrays):
            mine = pickle.dumps(arrays) if worker == root else b""
            return np.frombuffer(mine + bytes(-len(mine) % 4), np.int32)

        def unpack(packed):
            return pickle.loads(packed.tobytes())

        packed = tf.numpy_function(pack, [root, tf.cast(mpi_ops.rank_op(), tf.int64), *tensors], tf.int32)
        packed.set_shape((None,))
        length = self._workers.allreduce(tf.size(packed)[None], "state.length", Max)[0]
        padded = tf.pad(packed, [[0, length - tf.size(packed)]])
        summed = self._workers.allreduce(padded, "state", Sum)
        return tf.numpy_function(unpack, [summed], [tensor.dtype for tensor in tensors])

    def begin_again(self) -> None:
        """Lets the workers agree again."""
        self.agreed.assign(self._workers.alone)
