"""Who averages in 8 bits, as ops in a graph: each worker for itself, or a host for all its workers."""

from dataclasses import dataclass

import tensorflow as tf

from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.hosts import Host
from horovod_powersgd.tensorflow.workers import Number, Workers, elastic


@dataclass(frozen=True)
class Senders:
    """The workers, each of which has messages of its own.

    Attributes:
        workers: that exchange.
    """

    workers: Workers

    @property
    def count(self) -> Number:
        """How many there are."""
        return self.workers.count(tf.int64) if elastic() else self.workers.size

    def number(self) -> tf.Tensor:
        """This one's among them, int64."""
        return self.workers.number()

    def gather(self, message: tf.Tensor, name: str) -> tuple[tf.Tensor, Traffic]:
        """What all send to all, (count, bytes), where this one sends a message (bytes,); and what was sent."""
        nbytes = tf.size(message, tf.int64)
        return self.workers.gather(message, name), Traffic(nbytes, nbytes * self.workers.count(tf.int64))

    def exchange(self, messages: tf.Tensor, name: str) -> tuple[tf.Tensor, Traffic]:
        """What all send to this one, (count, bytes), where this one sends each a message (count, bytes); and what was
        sent."""
        nbytes = tf.size(messages, tf.int64)
        return self.workers.alltoall(messages, name), Traffic(nbytes, nbytes)


@dataclass(frozen=True)
class Hosts(Senders):
    """The hosts. All workers of one have its messages; each sends a part of every message to its likes on the other
    hosts, who tell theirs: so a message comes to each host once.

    Attributes:
        host: this worker's, of tensors.
    """

    host: Host

    @property
    def count(self) -> Number:
        return tf.shape(self.host.hosts, tf.int64)[0]

    def number(self) -> tf.Tensor:
        return self.host.number

    def gather(self, message: tf.Tensor, name: str) -> tuple[tf.Tensor, Traffic]:
        def part_by_part():
            return self.exchange(tf.tile(message[None], [self.count, 1]), name)

        # In one level each worker is a host.
        return tf.cond(self.host.share.parts > 1, part_by_part, lambda: Senders.gather(self, message, f"{name}.whole"))

    def exchange(self, messages: tf.Tensor, name: str) -> tuple[tf.Tensor, Traffic]:
        mine, host = self._my_part(messages), self.host
        # Messages come and go in the order of the workers' numbers, which need not be that of their hosts.
        numbers = host.hosts[:, host.share.place]
        places = tf.argsort(numbers)
        one = tf.ones_like(numbers)
        found = self.workers.exchange(tf.gather(mine, places), tf.gather(numbers, places), one, name)
        found = tf.gather(found, tf.argsort(places))

        def of_all():
            told = tf.tile(found[None], [host.share.parts, 1, 1])
            parts = self.workers.exchange(told, host.peers, tf.ones_like(host.peers), f"{name}.parts")
            return tf.reshape(tf.transpose(parts, [1, 0, 2]), tf.stack([self.count, -1]))

        whole = tf.cond(host.share.parts > 1, of_all, lambda: found)
        nbytes = tf.size(mine, tf.int64)
        return whole[:, : tf.shape(messages)[1]], Traffic(nbytes, nbytes)

    def _my_part(self, messages: tf.Tensor) -> tf.Tensor:
        """Of messages (count, bytes), (count, part of the bytes); zeros make all parts equally long."""
        (place, parts), length = self.host.share, tf.shape(messages, tf.int64)[1]
        size = -(-length // parts)
        return tf.pad(messages, [[0, 0], [0, parts * size - length]])[:, place * size : (place + 1) * size]
