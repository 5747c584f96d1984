"""The workers that exchange gradients, by Horovod's ops in a graph."""

import os
import pickle
import re
from dataclasses import dataclass, replace
from typing import Callable, List, Optional, Sequence

import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops
from horovod.tensorflow.mpi_ops import Average, Max, ProcessSet, Sum

from horovod_powersgd.agreement import MOST_WORKERS, Description, ballot, differences
from horovod_powersgd.compressors.compressor import Compressor, refusal_of_join


@dataclass(frozen=True)
class Workers:
    """The workers that average together. Every method adds ops to the graph that is being built.

    Attributes:
        process_set: Horovod's.
        prefix: of all tensor names sent to Horovod, so that several exchanges can live in one process.
        predivide_factor: the part of the division by the number of workers that comes before the sum.
        device: of Horovod's ops; "" is TensorFlow's choice.
        device_sparse: of those for sparse gradients.
        prefix_of_agreement: in the prefix's place before the workers agree; the same for those that may not.
    """

    process_set: ProcessSet
    prefix: str
    predivide_factor: float = 1.0
    device: str = ""
    device_sparse: str = ""
    prefix_of_agreement: str = ""

    @property
    def alone(self) -> bool:
        """Whether there is one worker, and will be."""
        return not elastic() and self.process_set.size() == 1

    def count(self, dtype: tf.DType) -> tf.Tensor:
        """W. In an elastic job it can change from step to step."""
        if elastic():
            return tf.cast(mpi_ops.size_op(process_set_id=self.process_set.process_set_id), dtype)
        return tf.cast(self.process_set.size(), dtype)

    def number(self) -> tf.Tensor:
        """This worker's, int64. In an elastic job it can change from step to step."""
        if elastic() and self.process_set.process_set_id == 0:
            return tf.cast(mpi_ops.rank_op(), tf.int64)
        return tf.constant(self.process_set.rank(), tf.int64)

    def mean(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The average of a tensor of a dtype that Horovod reduces."""
        if self.alone:
            return tensor
        # Half precision overflows where the sum comes before the division.
        predivide_factor = self.process_set.size() if tensor.dtype == tf.float16 else self.predivide_factor
        return self._allreduce(tensor, name, Average, 1 / predivide_factor, predivide_factor)

    def sparse_mean(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        """The average of slices, as Horovod makes it: all workers' parts are gathered."""
        if self.alone:
            return slices
        with tf.device(self.device_sparse):
            values = self._allgather(slices.values, f"{name}.values")
            indices = self._allgather(slices.indices, f"{name}.indices")
        return tf.IndexedSlices(values / self.count(values.dtype), indices, slices.dense_shape)

    def gather(self, packed: tf.Tensor, name: str) -> tf.Tensor:
        """All workers' bytes, (W, size); they all have as many."""
        if self.alone:
            return packed[None]
        with tf.device(self.device):
            gathered = self._allgather(packed, name)
        return tf.reshape(gathered, tf.stack([self.count(tf.int32), tf.size(packed)]))

    def all_there(self, name: str, compressor: Optional[Compressor]) -> tf.Operation:
        """An op that fails with an InvalidArgumentError where a worker has joined (hvd.join). Horovod's allgather would
        then break down, and the job with it. Costs one small allreduce.

        Args:
            name: of the message.
            compressor: that gathers; None where it is sparse gradients that are gathered.
        """
        if self.alone:
            return tf.no_op()

        def refuse():
            def tell():
                raise ValueError(refusal_of_join(compressor))

            refused = tf.numpy_function(tell, [], tf.bool)
            refused.set_shape(())
            return refused

        # A joined worker's part is zero.
        there = self._allreduce(_not_constant(tf.ones((1,), tf.int32)), name, Sum)
        return tf.cond(tf.equal(there[0], self.count(tf.int32)), lambda: tf.constant(True), refuse).op

    def taken(self, root: tf.Tensor, tensors: Sequence[tf.Tensor], name: str) -> List[tf.Tensor]:
        """The root's tensors, where the root, a global number, is known only when the graph runs. Their shapes can
        differ among the workers. By allreduce, which a worker may have joined."""

        def pack(root, worker, *arrays):
            mine = pickle.dumps(arrays) if worker == root else b""
            return np.frombuffer(mine + bytes(-len(mine) % 4), np.int32)

        def unpack(packed):
            return pickle.loads(packed.tobytes())

        packed = tf.numpy_function(pack, [root, tf.cast(mpi_ops.rank_op(), tf.int64), *tensors], tf.int32)
        packed.set_shape((None,))
        length = self._allreduce(tf.size(packed)[None], f"{name}.length", Max)[0]
        padded = tf.pad(packed, [[0, length - tf.size(packed)]])
        return tf.numpy_function(unpack, [self._allreduce(padded, name, Sum)], [tensor.dtype for tensor in tensors])

    def agree(
        self,
        description: Description,
        names: Sequence[str],
        steps: tf.Tensor,
        take_state: Callable[[tf.Tensor], tf.Operation],
    ) -> tf.Operation:
        """Checks that all workers have the same description, and lets them take the state of the one that went
        farthest, where one has exchanged anything or the names differ. Costs one small allreduce.

        Args:
            description: this worker's.
            names: this worker's, which may differ.
            steps: int64, that this worker has exchanged.
            take_state: adds the ops that take the state of the worker whose global number it is given.

        Returns:
            An op. It fails with an InvalidArgumentError on every worker, that says what differs between whom.
        """
        described, named = ballot(description), ballot({"names": "\n".join(names)})
        place = (steps + 1) * MOST_WORKERS - tf.cast(mpi_ops.rank_op(), tf.int64)
        mine = tf.concat([tf.constant(described + named, tf.int64), [place]], 0)
        largest = self._before_agreement()._allreduce(mine, "agreement", Max)
        equal = tf.equal(largest, mine)
        same, alike = tf.reduce_all(equal[: len(described)]), tf.reduce_all(equal[len(described) : -1])
        checked = tf.cond(same, lambda: True, lambda: self._refuse(description))
        with tf.control_dependencies([checked]):
            place = tf.identity(largest[-1])

        def take():
            with tf.control_dependencies([take_state(tf.math.floormod(-place, MOST_WORKERS))]):
                return tf.constant(True)

        return tf.cond((place > MOST_WORKERS) | ~alike, take, lambda: True).op

    def _before_agreement(self) -> "Workers":
        return replace(self, prefix=self.prefix_of_agreement)

    def _refuse(self, description: Description) -> tf.Tensor:
        def refuse(sizes, pickled):
            parts = np.split(pickled, np.cumsum(sizes)[:-1])
            # As a ValueError it becomes an InvalidArgumentError, which no elastic job takes for a lost worker.
            raise ValueError(f"The workers do not agree:\n{differences([pickle.loads(p.tobytes()) for p in parts])}")

        mine = np.frombuffer(pickle.dumps(description), np.uint8)
        workers = self._before_agreement()
        sizes = workers._allgather(tf.constant([len(mine)]), "disagreement.sizes")
        pickled = workers._allgather(tf.constant(mine), "disagreement.descriptions")
        refused = tf.numpy_function(refuse, [sizes, pickled], tf.bool)
        refused.set_shape(())
        return refused

    def _allreduce(self, tensor: tf.Tensor, name: str, op: int, prescale: float = 1.0, postscale: float = 1.0):
        with tf.device(self.device):
            return mpi_ops._allreduce(
                tensor,
                name=self._full_name(name),
                op=op,
                prescale_factor=prescale,
                postscale_factor=postscale,
                ignore_name_scope=True,
                process_set=self.process_set,
            )

    def _allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return mpi_ops.allgather(_not_constant(tensor), self._full_name(name), True, self.process_set)

    def _full_name(self, name: str) -> str:
        """As an operation can be called; Horovod, told to ignore the scope, would drop what is before a slash."""
        return re.sub("[^A-Za-z0-9_.]", ".", f"{self.prefix}.{name}")


def _not_constant(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor. Constants, TensorFlow would exchange at once, when it optimizes the graph, and whatever branch they
    are in."""
    return tf.cond(mpi_ops.rank_op() >= 0, lambda: tensor, lambda: tf.zeros_like(tensor))


def elastic() -> bool:
    """Whether the workers can change."""
    return bool(int(os.environ.get("HOROVOD_ELASTIC", 0)))


def transportable(dtype: tf.DType) -> tf.DType:
    """The dtype that a gradient travels in; Horovod does not reduce bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype
