"""How many steps were exchanged, and what was sent for them."""

import functools

import numpy as np
import tensorflow as tf

from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.tensorflow.chosen import Chosen
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.variable import make_variable


class StepCounters:
    """What variables share that are exchanged together.

    Attributes:
        steps: int64 variable: exchanged with finite results.
        bytes_sent: int64 variable: handed to allreduce and allgather in the last step.
        bytes_received: int64 variable: what those handed back.
        bytes_uncompressed: int64 variable: what plain allreduce would have been handed.
        total_bytes_sent: int64 variable: in all steps.
        total_bytes_received: int64 variable: in all steps.
        total_bytes_uncompressed: int64 variable: in all steps.
        exchanges: made for these variables, or some of them.
        chosen: Auto's.
    """

    def __init__(self):
        self.steps = make_variable(np.int64(0))
        self.bytes_sent, self.total_bytes_sent = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.bytes_received, self.total_bytes_received = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.bytes_uncompressed, self.total_bytes_uncompressed = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.exchanges: dict = {}
        self.chosen: Chosen | None = None

    @functools.cached_property
    def snapshot(self) -> Snapshot:
        """Of what a step that is not taken must not change: the bytes have been sent all the same."""
        return Snapshot([self.steps])

    def begin_again(self) -> None:
        """Forgets all steps."""
        for variable in self.variables().values():
            variable.assign(0)

    def shared(self) -> dict[str, tf.Variable]:
        """What is the same on every worker, by name, as a checkpoint holds it."""
        return {"steps": self.steps, **({} if self.chosen is None else self.chosen.variables())}

    def variables(self) -> dict[str, tf.Variable]:
        """All, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, tf.Variable)}

    def count(self, finite: tf.Tensor, traffic: Traffic, bytes_uncompressed: tf.Tensor) -> tf.Operation:
        """The op that counts a step.

        Args:
            finite: whether it is; a step that is not counts for its bytes only.
            traffic: int64 tensors.
            bytes_uncompressed: that plain allreduce would have been handed, int64.
        """
        return tf.group(
            self.steps.assign_add(tf.cast(finite, tf.int64), read_value=False),
            self.bytes_sent.assign(traffic.sent, read_value=False),
            self.total_bytes_sent.assign_add(traffic.sent, read_value=False),
            self.bytes_received.assign(traffic.received, read_value=False),
            self.total_bytes_received.assign_add(traffic.received, read_value=False),
            self.bytes_uncompressed.assign(bytes_uncompressed, read_value=False),
            self.total_bytes_uncompressed.assign_add(bytes_uncompressed, read_value=False),
        )
