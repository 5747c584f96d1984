"""What Accordion decides for one variable, from step to step: ops in a graph."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from horovod_powersgd.compressors.accordion import Accordion, Regime
from horovod_powersgd.layout import Layout
from horovod_powersgd.tensorflow.graph_function import graph_function
from horovod_powersgd.tensorflow.variable import Assignment, make_variable

# The learning rate where it is not known: none is lower. It is a number, or tf.debugging.enable_check_numerics would
# tell of it.
UNKNOWN = np.finfo(np.float64).min


class Decision(NamedTuple):
    """What Accordion says in one step.

    Attributes:
        step: how many were exchanged before.
        is_low: whether the compression is low.
        is_new: whether that was decided in this step.
        begins: whether the step is the first of an interval.
        norm: of the sum of the last interval.
        rate: the learning rate; UNKNOWN where it is not known.
    """

    step: tf.Tensor
    is_low: tf.Tensor
    is_new: tf.Tensor
    begins: tf.Tensor
    norm: tf.Tensor
    rate: tf.Tensor


class AccordionState:
    """accordion.Regime in variables.

    Attributes:
        total: (n, m); zeros for None.
        last_norm: float64; -1 for None.
        rate: float64; UNKNOWN for None.
        is_low: bool.
        decisions: (k, 2), int64: step, and 1 for low or 0 for high.
    """

    def __init__(self, config: Accordion, layout: Layout, dtype: tf.DType):
        self._config, self._layout = config, layout
        self.total = make_variable(np.zeros(layout.matrix_shape, dtype.as_numpy_dtype))
        self.last_norm, self.rate = make_variable(np.float64(-1)), make_variable(UNKNOWN)
        self.is_low = make_variable(np.bool_(True))
        self.decisions = make_variable(np.zeros((0, 2), np.int64), (None, 2))

    def variables(self) -> dict[str, tf.Variable]:
        """All, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, tf.Variable)}

    def decide(self, step: tf.Tensor, rate: tf.Tensor | None) -> Decision:
        """Regime.decided."""
        rate = tf.constant(UNKNOWN) if rate is None else rate
        regime = [tf.convert_to_tensor(v) for v in (self.total, self.last_norm, self.rate, self.is_low)]
        config = tf.constant(self._config.interval, tf.int64), tf.constant(self._config.threshold, tf.float64)
        is_low, is_new, begins, norm = _decide(*regime, *config, step, rate)
        return Decision(step, is_low, is_new, begins, norm, rate)

    def amount(self, decision: Decision) -> tf.Tensor:
        """Compressor.amount, int64."""
        low, high = (self._config.amount_now(*self._layout.matrix, is_low) for is_low in (True, False))
        return tf.where(decision.is_low, tf.constant(low, tf.int64), tf.constant(high, tf.int64))

    def kept(self, decision: Decision, update: tf.Tensor) -> list[Assignment]:
        """What ends a finite step; `update` is (n, m)."""
        return [
            (self.total, _added(decision.begins, tf.convert_to_tensor(self.total), update)),
            (self.decisions, _appended(decision, tf.convert_to_tensor(self.decisions))),
            (self.last_norm, decision.norm),
            (self.rate, decision.rate),
            (self.is_low, decision.is_low),
        ]

    def decided(self) -> tuple[tuple[int, str], ...]:
        """TensorStats.decisions."""
        return tuple((int(step), "low" if is_low else "high") for step, is_low in self.decisions.numpy())

    def state_dict(self) -> dict[str, object]:
        """Regime.state_dict."""
        last_norm = float(self.last_norm) if self.last_norm >= 0 else None
        rate = None if float(self.rate) == UNKNOWN else float(self.rate)
        regime = Regime(self.total.numpy(), last_norm, rate, bool(self.is_low), self.decided())
        return regime.state_dict(lambda total: total)

    def load_state_dict(self, state: Mapping) -> None:
        """Takes what state_dict gave."""
        regime = Regime.from_state_dict(state, lambda total: total)
        self.total.assign(tf.zeros_like(self.total) if regime.total is None else regime.total)
        self.last_norm.assign(-1 if regime.last_norm is None else regime.last_norm)
        self.rate.assign(UNKNOWN if regime.rate is None else regime.rate)
        self.is_low.assign(regime.is_low)
        decisions = [(step, is_low == "low") for step, is_low in regime.decisions]
        self.decisions.assign(np.array(decisions, np.int64).reshape(-1, 2))


@graph_function
def _decide(total, last, last_rate, was_low, interval, threshold, step, rate):
    """A Decision, from is_low to norm."""
    begins = tf.equal(tf.math.floormod(step, interval), 0)
    norm = tf.cond(begins, lambda: tf.norm(tf.cast(total, tf.float64)), lambda: last)
    critical = (last <= 0) | tf.logical_not(tf.math.is_finite(norm)) | (tf.abs(last - norm) >= threshold * last)
    decays = (rate < last_rate) & (rate > UNKNOWN)
    is_low = decays | tf.where(begins, critical, was_low)
    return is_low, begins | (decays & tf.logical_not(was_low)), begins, norm


@graph_function
def _added(begins, total, update):
    return tf.cond(begins, lambda: update, lambda: total + update)


@graph_function
def _appended(decision: Decision, decisions):
    row = tf.stack([decision.step, tf.cast(decision.is_low, tf.int64)])
    return tf.cond(decision.is_new, lambda: tf.concat([decisions, [row]], 0), lambda: decisions)
