"""What is kept of a variable from step to step."""

import functools
import re
import weakref
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet

from horovod_powersgd import PowerSGD
from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.factors import initial_factor
from horovod_powersgd.layout import layout_of, trailing_columns
from horovod_powersgd.randomness import key_of
from horovod_powersgd.statistics import residual
from horovod_powersgd.tensorflow.adaptation import Adaptation
from horovod_powersgd.tensorflow.kept import initial_values
from horovod_powersgd.tensorflow.snapshot import Snapshot
from horovod_powersgd.tensorflow.variable import make_variable, native

# The variable's attribute that holds its states.
ATTRIBUTE = "_powersgd_states"


class Training:
    """What states belong to beside their variable: a new training of the same variables begins with nothing. An
    optimizer is one."""


# Tapes are made anew in each step, and go on with one training.
TAPES = Training()
# Has the states that are loaded before anything is exchanged; whatever exchanges first goes on with them.
LOADED = Training()


class Clock:
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
    """

    def __init__(self):
        self.steps = make_variable(np.int64(0))
        self.bytes_sent, self.total_bytes_sent = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.bytes_received, self.total_bytes_received = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.bytes_uncompressed, self.total_bytes_uncompressed = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.exchanges: Dict = {}

    @functools.cached_property
    def snapshot(self) -> Snapshot:
        """Of what a step that is not taken must not change: the bytes have been sent all the same."""
        return Snapshot([self.steps])

    def begin_again(self) -> None:
        """Forgets all steps."""
        for variable in self.variables().values():
            variable.assign(0)

    def variables(self) -> Dict[str, tf.Variable]:
        """All, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, tf.Variable)}


class VariableState:
    """What is kept of one variable in one training. It lives as long as both.

    The dtype of memory, factors and totals is float64 for float64 variables, else float32. What a variable or its
    compressor has no use for is None.

    Attributes:
        name: of the variable.
        config: with which it is exchanged.
        process_set: with which it is exchanged.
        layout: of the variable, an n x m matrix.
        clock: of the variables that it is exchanged with.
        key: int64 variable: MatrixState.key, of the name, or of what the variable is called on another worker, if that
            has gone farther.
        factor: PowerSGD's last averaged factor, transposed: a variable of (r, m), or of (r, n) where factor_is_q is
            false.
        factor_is_q: True, or a boolean variable where P and Q alternate.
        kept: the other compressors': variables, by the key that the compressor keeps them under.
        memory: (n, m) variable, zeros at first; this worker's own.
        usual_clipping: float64 variable: the usual factor of horovod_powersgd.clipping; 0 at first.
        adaptation: Accordion's.
        norm: float64 variable: of the part of delta that was sent in the last step, for PowerSGD; of delta, for the
            others. Not a number before the first step.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: tf.DType,
        config: Compressor,
        process_set: ProcessSet,
        clock: Clock,
    ):
        self.name, self.config, self.process_set, self.clock = name, config, process_set, clock
        self.layout = layout_of(shape, config, trailing_columns)
        self.variable_dtype = dtype
        self.dtype = tf.float64 if dtype == tf.float64 else tf.float32
        self.key = self.factor = self.factor_is_q = None
        self.memory = self.usual_clipping = self.adaptation = self.norm = None
        self.kept: Dict[str, tf.Variable] = {}
        if not self.layout.compressed:
            return
        self.key = make_variable(np.int64(key_of(name, config.seed)))
        if isinstance(config.family, PowerSGD):
            self._make_factor()
        else:
            initial = initial_values(config.family, name, self.layout.matrix_shape, self.layout.amount, self.dtype)
            self.kept = {key: make_variable(value) for key, value in initial.items()}
        if config.keeps_memory:
            self.memory = make_variable(np.zeros(self.layout.matrix_shape, self.dtype.as_numpy_dtype))
            self.usual_clipping = make_variable(np.float64(0))
        if config.error_feedback:
            self.norm = make_variable(np.float64("nan"))
        if isinstance(config, Accordion):
            self.adaptation = Adaptation(config, self.layout, self.dtype)

    def _make_factor(self) -> None:
        rank, columns = self.layout.amount, self.layout.matrix_shape[1]
        alternates = self.config.family.num_iters_per_step % 2 == 1
        shape = None if isinstance(self.config, Accordion) else rank, None if alternates else columns
        starting = initial_factor(self.name, columns, rank, self.config.seed).T
        self.factor = make_variable(np.ascontiguousarray(starting, self.dtype.as_numpy_dtype), shape)
        self.factor_is_q = make_variable(np.bool_(True)) if alternates else True

    def shared(self) -> Dict[str, tf.Variable]:
        """What is the same on every worker, by name, as a checkpoint holds it."""
        found = {"factor": self.factor, "factor_is_q": self.factor_is_q, "usual_clipping": self.usual_clipping}
        found.update((f"kept.{key}", variable) for key, variable in self.kept.items())
        if self.adaptation is not None:
            found.update(self.adaptation.variables())
        return {name: value for name, value in found.items() if isinstance(value, tf.Variable)}

    def shared_with_keys(self) -> Dict[str, tf.Variable]:
        """What is to be the same on every worker, by name."""
        return {"key": self.key, **self.shared()} if self.layout.compressed else {}

    def variables(self) -> Dict[str, tf.Variable]:
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
            self.name, self.layout.shape, self.variable_dtype, self.config, self.process_set, self.clock
        ).variables()
        for name, variable in self.variables().items():
            variable.assign(new[name])

    def decisions(self) -> Tuple[Tuple[int, str], ...]:
        """TensorStats.decisions."""
        return () if self.adaptation is None else self.adaptation.decided()

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step; None where there was none or without error feedback."""
        if self.norm is None or np.isnan(self.norm):
            return None
        left, norm = float(tf.norm(tf.cast(self.memory, tf.float64))), float(self.norm)
        if self.factor is not None:
            return residual(left, norm)
        return left / norm if norm else 0.0

    def state_dict(self) -> Dict[str, object]:
        """What is kept, as numpy arrays."""
        state: Dict[str, object] = {"shape": list(self.layout.shape)}
        if not self.layout.compressed:
            return state
        state["memory"] = None
        if self.memory is not None:
            state.update(memory=self.memory.numpy(), usual_clipping=float(self.usual_clipping))
        if self.factor is not None:
            state.update(factor=self.factor.numpy(), factor_is_q=bool(self.factor_is_q))
        else:
            state["kept"] = {key: variable.numpy() for key, variable in self.kept.items()}
        if self.adaptation is not None:
            state["regime"] = self.adaptation.state_dict()
        return state

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        """Takes what was saved, and the sum of saved memories, times `weight`."""
        if not self.layout.compressed:
            return
        if self.factor is not None:
            self.factor.assign(state["factor"])
            if self.factor_is_q is not True:
                self.factor_is_q.assign(state["factor_is_q"])
        else:
            for key, variable in self.kept.items():
                variable.assign(state["kept"][key])
        if self.adaptation is not None:
            self.adaptation.load_state_dict(state["regime"])
        if self.norm is not None:
            self.norm.assign(np.nan)
        if self.memory is not None:
            memory = sum(saved["memory"] for saved in memories) if memories else 0
            self.memory.assign(np.broadcast_to(memory * weight, self.memory.shape))
            self.usual_clipping.assign(state.get("usual_clipping", 0))


def states_of(
    variables: Sequence, config: Compressor, process_set: ProcessSet, training: Training
) -> List[VariableState]:
    """The variables' states in a training, made where they have none. In an order that is the same on every worker."""
    key = config, process_set.process_set_id
    kept = [_states(variable).setdefault(training, {}) for variable in variables]
    for variable, states in zip(variables, kept):
        loaded = _states(variable).get(LOADED, {})
        if key in loaded and key not in states:
            states[key] = loaded.pop(key)
    clock = next((states[key].clock for states in kept if key in states), None) or Clock()
    names = {states[key].name for states in kept if key in states}
    for variable, states in zip(variables, kept):
        if key not in states:
            name = _unused(_name(variable), names)
            names.add(name)
            with tf.device(native(variable).device):
                states[key] = VariableState(
                    name, variable.shape, native(variable).dtype, config, process_set, clock
                )
    return [states[key] for states in kept]


def known_states(variables: Sequence) -> List[VariableState]:
    """The states that variables have already, in whatever training."""
    return [state for _, state in _known(variables)]


def last_training(variables: Sequence, config: Optional[Compressor] = None, process_set: Optional[ProcessSet] = None):
    """The training of these variables that began last, and a state that it has.

    Args:
        variables: of TensorFlow or of Keras 3.
        config, process_set: that they are exchanged with; None: whatever.

    Returns:
        (Training, VariableState); None where there is none.
    """
    found = None
    for training, state in _known(variables):
        if config in (None, state.config) and process_set in (None, state.process_set):
            found = training, state
    return found


def state_in(training: Training, variable, config: Compressor, process_set: ProcessSet) -> Optional[VariableState]:
    """The variable's state in a training; None where it has none."""
    return getattr(native(variable), ATTRIBUTE, {}).get(training, {}).get((config, process_set.process_set_id))


def _states(variable) -> Mapping[Training, Dict[Tuple[Compressor, int], VariableState]]:
    return vars(native(variable)).setdefault(ATTRIBUTE, weakref.WeakKeyDictionary())


def _known(variables: Sequence) -> Iterator[Tuple[Training, VariableState]]:
    for variable in variables:
        for training, states in getattr(native(variable), ATTRIBUTE, {}).items():
            for state in states.values():
                yield training, state


def plain_name(name: str) -> str:
    """What is the same on all workers of a Keras variable's name: not the layers that it belongs to, which Keras counts
    from the first that a process makes, and names anew when it loads a model."""
    return re.sub(r"_\d+$", "", name.rpartition("/")[2])


def _name(variable) -> str:
    return variable.path if hasattr(variable, "path") else variable.name.partition(":")[0]


def _unused(name: str, used) -> str:
    candidates = (f"{name}_{i}" if i else name for i in range(len(used) + 1))
    return next(candidate for candidate in candidates if candidate not in used)
