"""What is kept of a variable from step to step."""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet

from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import RowShare
from horovod_powersgd.layout import layout_of, trailing_columns
from horovod_powersgd.randomness import key_of
from horovod_powersgd.statistics import residual
from horovod_powersgd.tensorflow.accordion import AccordionState
from horovod_powersgd.tensorflow.half_memory import unit_of
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.step_counters import StepCounters
from horovod_powersgd.tensorflow.variable import Assignment, make_variable


class VariableState:
    """What is kept of one variable in one training. It lives as long as both.

    Args:
        name, shape, dtype: of the variable.
        memory_of: whose memory it takes, where that has one and this one keeps one.
        (the others): as below.

    The dtype of memory, factors and totals is float64 for float64 variables, else float32. What a variable or its
    compressor has no use for is None.

    Attributes:
        name: of the variable.
        config: with which it is exchanged.
        process_set: with which it is exchanged.
        layout: of the variable, an n x m matrix.
        counters: of the variables that it is exchanged with.
        gradient_class: what its gradient goes through where it is compressed; makes the variables that it needs.
        key: int64 variable: MatrixState.key, of the name, or of what the variable is called on another worker, if that
            has gone farther.
        factor: PowerSGD's last averaged factor, transposed: a variable of (r, m), or of (r, n) where factor_is_q is
            false.
        factor_is_q: True, or a boolean variable where P and Q alternate.
        kept: the other compressors': variables, by the key that the compressor keeps them under.
        memory: (n, m) variable, zeros at first; this worker's own. In an exchange that may have two levels it is a
            variable of (rows, m), none at first: of a share of the rows.
            In 16 bits a number where PowerSGD.memory_dtype says so: `remembered` reads it, and `remembering` and
            `remember` write it.
        memory_unit: float32 variable: what a memory of dtype float16 is multiplied by.
        memory_share: int64 variable (2,): that share, a RowShare's numbers.
        usual_clipping: float64 variable: the usual factor of horovod_powersgd.clipping; 0 at first.
        accordion: Accordion's.
        norm: float64 variable: of the part of delta that was sent in the last step, for PowerSGD; of delta, for the
            others. NaN before the first step.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: tf.DType,
        config: Compressor,
        process_set: ProcessSet,
        counters: StepCounters,
        gradient_class,
        memory_of: "VariableState | None" = None,
    ):
        self.name, self.config, self.process_set, self.counters = name, config, process_set, counters
        self.gradient_class = gradient_class
        self.layout = layout_of(shape, config, trailing_columns)
        self.variable_dtype = dtype
        self.dtype = tf.float64 if dtype == tf.float64 else tf.float32
        self.key: tf.Variable | None = None
        self.factor: tf.Variable | None = None
        self.factor_is_q: Literal[True] | tf.Variable | None = None
        self.memory: tf.Variable | None = None
        self.memory_unit: tf.Variable | None = None
        self.memory_share: tf.Variable | None = None
        self.usual_clipping: tf.Variable | None = None
        self.accordion: AccordionState | None = None
        self.norm: tf.Variable | None = None
        self.kept: dict[str, tf.Variable] = {}
        if not self.layout.compressed:
            return
        self.key = make_variable(np.int64(key_of(name, config.seed)))
        gradient_class.prepare(self)
        if config.keeps_memory:
            if memory_of is not None and memory_of.memory is not None:
                self.memory, self.memory_unit = memory_of.memory, memory_of.memory_unit
                self.usual_clipping = memory_of.usual_clipping
            else:
                if self.memory is None:
                    self.memory = make_variable(np.zeros(self.layout.matrix_shape, self.memory_dtype.as_numpy_dtype))
                if self.memory_dtype == tf.float16:
                    self.memory_unit = make_variable(np.float32(1))
                self.usual_clipping = make_variable(np.float64(0))
        if config.error_feedback:
            self.norm = make_variable(np.float64("nan"))
        if isinstance(config, Accordion):
            self.accordion = AccordionState(config, self.layout, self.dtype)

    @property
    def current(self) -> "VariableState":
        """The one that the last steps were exchanged with, unless the gradient travelled as it is: this one."""
        return self

    @property
    def keeping(self) -> "VariableState":
        """The one whose compressor is saved: this one; of several, one that keeps a memory."""
        return self

    def saved(self) -> dict[str, object]:
        """What is saved of the variable: what that one keeps; of several, the memory also where another one has it."""
        return self.state_dict()

    @property
    def memory_dtype(self) -> tf.DType:
        """Of the memory's variable."""
        return tf.as_dtype(self.config.family.memory_dtype or self.dtype)

    def remembered(self, snapshot: Snapshot | None = None) -> tf.Tensor:
        """The memory, in the dtype of the rest; or what it was when a snapshot was taken."""
        assert self.memory is not None
        kept, unit = self.memory, self.memory_unit
        if snapshot is not None:
            kept, unit = snapshot.copy_of(kept), None if unit is None else snapshot.copy_of(unit)
        memory = tf.cast(kept, self.dtype)
        return memory if unit is None else memory * tf.cast(unit, self.dtype)

    def remember(self, memory: tf.Tensor) -> None:
        """Keeps a memory."""
        for variable, value in self.remembering(memory):
            variable.assign(value, read_value=False)

    def remembering(self, memory: tf.Tensor) -> list[Assignment]:
        """What keeps a memory; in 16 bits, what those do not hold is rounded to nearest."""
        assert self.memory is not None
        if self.memory_unit is None:
            return [(self.memory, tf.cast(memory, self.memory_dtype))]
        unit = unit_of(memory)
        return [
            (self.memory_unit, unit),
            (self.memory, tf.cast(memory / tf.cast(unit, self.dtype), self.memory_dtype)),
        ]

    def shared(self) -> dict[str, tf.Variable]:
        """What is the same on every worker, by name, as a checkpoint holds it."""
        found = {"factor": self.factor, "factor_is_q": self.factor_is_q, "usual_clipping": self.usual_clipping}
        found.update((f"kept.{key}", variable) for key, variable in self.kept.items())
        if self.accordion is not None:
            found.update(self.accordion.variables())
        return {name: value for name, value in found.items() if isinstance(value, tf.Variable)}

    def shared_with_keys(self) -> dict[str, tf.Variable]:
        """What is to be the same on every worker, by name."""
        return {"key": self.key, **self.shared()} if self.layout.compressed else {}

    def variables(self) -> dict[str, tf.Variable]:
        """All, by name."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, tf.Variable)}
        return {**own, **self.shared()}

    def rename(self, name: str) -> None:
        """Gives it the name that it was saved with: Keras can give a variable another path when it loads a model."""
        self.name = name
        if self.key is not None:
            self.key.assign(key_of(name, self.config.seed))

    @functools.cached_property
    def snapshot(self) -> Snapshot:
        """Of all."""
        return Snapshot(self.variables().values())

    def begin_again(self) -> None:
        """Forgets all steps."""
        new = VariableState(
            self.name, self.layout.shape, self.variable_dtype, self.config, self.process_set, self.counters,
            self.gradient_class,
        ).variables()
        for name, variable in self.variables().items():
            variable.assign(new[name])

    def decisions(self) -> tuple[tuple[int, str], ...]:
        """TensorStats.decisions."""
        return () if self.accordion is None else self.accordion.decided()

    def residual(self) -> float | None:
        """|e| / |delta| of the last step; None where there was none or without error feedback."""
        if self.norm is None or np.isnan(self.norm):
            return None
        left, norm = float(tf.norm(tf.cast(self.remembered(), tf.float64))), float(self.norm)
        if self.factor is not None:
            return residual(left, norm)
        return left / norm if norm else 0.0

    def state_dict(self) -> dict[str, object]:
        """What is kept, as numpy arrays."""
        state: dict[str, object] = {"shape": list(self.layout.shape)}
        if not self.layout.compressed:
            return state
        state["memory"] = None
        if self.memory is not None and self.usual_clipping is not None:
            state.update(memory=self.remembered().numpy(), usual_clipping=float(self.usual_clipping))
        if self.memory_share is not None:
            state["memory_share"] = [*self.memory_share.numpy().tolist(), self.layout.matrix[0]]
        if self.factor is not None:
            state.update(factor=self.factor.numpy(), factor_is_q=bool(self.factor_is_q))
        else:
            state["kept"] = {key: variable.numpy() for key, variable in self.kept.items()}
        if self.accordion is not None:
            state["regime"] = self.accordion.state_dict()
        return state

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        """Takes what was saved, and the sum of saved memories, times `weight`."""
        if not self.layout.compressed:
            return
        if self.factor is not None:
            self.factor.assign(state["factor"])
            if isinstance(self.factor_is_q, tf.Variable):
                self.factor_is_q.assign(state["factor_is_q"])
        else:
            for key, variable in self.kept.items():
                variable.assign(state["kept"][key])
        if self.accordion is not None:
            self.accordion.load_state_dict(state["regime"])
        if self.norm is not None:
            self.norm.assign(np.nan)
        if self.memory is not None:
            self.load_memory(state, memories, weight)

    def load_memory(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        """Takes the sum of saved memories, times `weight`, and the usual clipping of what was saved."""
        assert self.memory is not None and self.usual_clipping is not None
        self.usual_clipping.assign(state.get("usual_clipping", 0))
        rows, whole = self.layout.matrix[0], (0, 1)
        if self.memory_share is not None and weight == 1 and len(memories) == 1:
            # As it is: the exchange may go on with the same share.
            self.remember(tf.constant(memories[0]["memory"]))
            self.memory_share.assign(memories[0].get("memory_share", whole)[:2])
            return
        parts = [of_all_rows(saved["memory"], saved.get("memory_share", whole)[:2], rows) for saved in memories]
        self.remember(tf.constant(np.broadcast_to(sum(parts) * weight, self.layout.matrix), self.dtype))
        if self.memory_share is not None:
            self.memory_share.assign(whole)


def of_all_rows(memory, share: Sequence, rows: int) -> tf.Tensor:
    """What a worker's memory would be in an exchange of one level: so that the mean over all workers is that over the
    hosts, a share of the rows becomes as many times itself as workers share a host, and other rows zeros.

    Args:
        memory: of the rows of the share.
        share: a RowShare's numbers, int64 tensors or integers.
        rows: how many there are.
    """
    share = RowShare(*share)
    first, count = share.rows(rows)
    padded = tf.pad(memory * tf.cast(share.parts, memory.dtype), [[first, rows - first - count], [0, 0]])
    return tf.ensure_shape(padded, (rows, memory.shape[1]))
