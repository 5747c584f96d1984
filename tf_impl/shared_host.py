"""Which workers share this one's host, as ops in a graph: horovod_powersgd.hosts."""

import numpy as np
import tensorflow as tf
from horovod.tensorflow.mpi_ops import Max

from horovod_powersgd.hosts import Host, RowShare, host_key, host_of
from horovod_powersgd.tensorflow.variable import make_variable
from horovod_powersgd.tensorflow.workers import Workers


class SharedHost:
    """This worker's host, in an exchange that is to have two levels.

    Args:
        workers: that exchange.

    Attributes:
        hosts: int64 variable: Host.hosts; each worker alone where the exchange has one level, and worker 0 before the
            workers have agreed.
        flat_because: CompressionStats.flat_because.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        self.hosts = make_variable(np.zeros((1, 1), np.int64), (None, None))
        self.flat_because: str | None = None

    def look(self) -> tf.Operation:
        """An op that decides, on all workers alike, whether the exchange has two levels. Costs one small allreduce."""
        number, count = self._workers.number(), self._workers.count(tf.int64)
        key = tf.ensure_shape(tf.numpy_function(lambda: np.int64(host_key()), [], tf.int64), ())
        keys = self._workers.allreduce(tf.one_hot(number, tf.cast(count, tf.int32), key, np.int64(0)), "hosts", Max)
        hosts = tf.ensure_shape(tf.numpy_function(self._hosts_of, [keys, number], tf.int64), (None, None))
        return self.hosts.assign(hosts, read_value=False)

    def _hosts_of(self, keys: np.ndarray, number: np.int64) -> np.ndarray:
        found = host_of(keys.tolist(), int(number))
        self.flat_because = found if isinstance(found, str) else None
        return np.array([[n] for n in range(len(keys))] if isinstance(found, str) else found.hosts, np.int64)

    def now(self) -> Host:
        """The host, of int64 tensors; where the exchange has one level, one that this worker has for itself."""
        hosts = tf.convert_to_tensor(self.hosts)
        number, place = tf.unstack(tf.where(tf.equal(hosts, self._workers.number()))[0])
        return Host(hosts, number, RowShare(place, tf.shape(hosts, tf.int64)[1]))
