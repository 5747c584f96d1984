"""The workers that exchange gradients, by Horovod's ops in a graph."""

import os
import re
from dataclasses import dataclass
from typing import TypeAlias

import tensorflow as tf
from horovod.tensorflow import mpi_ops
from horovod.tensorflow.mpi_ops import Average, ProcessSet, Sum

from horovod_powersgd.compressors.collectives import refusal_of_join
from horovod_powersgd.compressors.compressor import Compressor

# Where it is not known before the graph runs, a scalar int64 tensor.
Number: TypeAlias = int | tf.Tensor


@dataclass(frozen=True)
class Workers:
    """The workers that average together. Every method adds ops to the graph that is being built.

    Attributes:
        process_set: Horovod's.
        prefix: of all tensor names sent to Horovod, so that several exchanges can live in one process.
        predivide_factor: the part of the division by the number of workers that comes before the sum.
        device: of Horovod's ops; "" is TensorFlow's choice.
        device_sparse: of those for sparse gradients.
    """

    process_set: ProcessSet
    prefix: str
    predivide_factor: float = 1.0
    device: str = ""
    device_sparse: str = ""

    @property
    def size(self) -> int:
        """W, while the graph is built."""
        return self.process_set.size()

    @property
    def single(self) -> bool:
        """Whether there is one worker, and will be."""
        return not elastic() and self.size == 1

    @property
    def alone(self) -> bool:
        """Whether this one exchanges nothing with others."""
        return self.single

    def count(self, dtype: tf.DType) -> tf.Tensor:
        """W. In an elastic job it can change from step to step."""
        if elastic():
            return tf.cast(mpi_ops.size_op(process_set_id=self.process_set.process_set_id), dtype)
        return tf.cast(self.size, dtype)

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
        predivide_factor = self.size if tensor.dtype == tf.float16 else self.predivide_factor
        return self.allreduce(tensor, name, Average, 1 / predivide_factor, predivide_factor)

    def sparse_mean(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        """The average of slices, as Horovod makes it: all workers' parts are gathered."""
        if self.alone:
            return slices
        with tf.device(self.device_sparse):
            values = self.allgather(slices.values, f"{name}.values")
            indices = self.allgather(slices.indices, f"{name}.indices")
        return tf.IndexedSlices(values / self.count(values.dtype), indices, slices.dense_shape)

    def gather(self, packed: tf.Tensor, name: str) -> tf.Tensor:
        """All workers' bytes, (W, size); they all have as many."""
        if self.alone:
            return packed[None]
        with tf.device(self.device):
            gathered = self.allgather(packed, name)
        return tf.reshape(gathered, tf.stack([self.count(tf.int32), tf.size(packed)]))

    def alltoall(self, messages: tf.Tensor, name: str) -> tf.Tensor:
        """What all workers have sent to this one, of their messages (W, bytes), one to each."""
        with tf.device(self.device):
            sent = mpi_ops.alltoall(not_constant(messages), None, self._full_name(name), True, self.process_set)
        return tf.ensure_shape(sent, messages.shape)

    def exchange(self, tensor: tf.Tensor, peers: tf.Tensor, sizes: tf.Tensor, name: str) -> tf.Tensor:
        """What some workers, this one among them, have sent to this one, one after the other.

        Args:
            tensor: what this one sends them, in their order.
            peers: their numbers, ascending, int64.
            sizes: how much of its first axis each of them is sent, int64.
            name: of the message.
        """
        splits = tf.scatter_nd(peers[:, None], tf.cast(sizes, tf.int32), self.count(tf.int64)[None])
        with tf.device(self.device):
            return mpi_ops.alltoall(not_constant(tensor), splits, self._full_name(name), True, self.process_set)[0]

    def all_there(self, name: str, compressor: Compressor | None) -> tf.Operation:
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
        there = self.allreduce(not_constant(tf.ones((1,), tf.int32)), name, Sum)
        return tf.cond(tf.equal(there[0], self.count(tf.int32)), lambda: tf.constant(True), refuse).op

    def allreduce(self, tensor: tf.Tensor, name: str, op: int, prescale: float = 1.0, postscale: float = 1.0):
        """Horovod's, on the device of these workers."""
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

    def sums(self, tensors: list[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The sums of several tensors, in one message if they are small enough."""
        with tf.device(self.device):
            return mpi_ops._grouped_allreduce(
                tensors, name=self._full_name(name), op=Sum, ignore_name_scope=True, process_set=self.process_set
            )

    def allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Horovod's: all workers' tensors, one after the other along the first axis."""
        return mpi_ops.allgather(not_constant(tensor), self._full_name(name), True, self.process_set)

    def _full_name(self, name: str) -> str:
        """As an operation can be called; Horovod, told to ignore the scope, would drop what is before a slash."""
        return re.sub("[^A-Za-z0-9_.]", ".", f"{self.prefix}.{name}")


def not_constant(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, hidden from constant folding: of a constant, TensorFlow would run the collective while it optimizes
    the graph, even one in a branch that is not taken. Where a slice begins is known only when the graph runs; all of
    the tensor is in this one."""
    hidden = tensor[tf.minimum(mpi_ops.rank_op(), 0) :]
    hidden.set_shape(tensor.shape)
    return hidden


def elastic() -> bool:
    """Whether the workers can change."""
    return bool(int(os.environ.get("HOROVOD_ELASTIC", 0)))


def transportable(dtype: tf.DType) -> tf.DType:
    """The dtype that a gradient travels in; Horovod does not reduce bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype
