"""What is kept of a variable from step to step."""

import re
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from horovod_powersgd import PowerSGD
from horovod_powersgd.layout import layout_of, trailing_columns
from horovod_powersgd.reference import initial_factor
from horovod_powersgd.statistics import residual

# The variable's attribute that holds its states.
ATTRIBUTE = "_powersgd_states"


class Clock:
    """What variables share that are exchanged together.

    Attributes:
        steps: int64 variable: exchanged with finite results.
        bytes_sent: int64 variable: handed to allreduce in the last step.
        bytes_uncompressed: int64 variable: what plain allreduce would have been handed.
        total_bytes_sent: int64 variable: in all steps.
        total_bytes_uncompressed: int64 variable: in all steps.
        exchanges: made for these variables, or some of them.
    """

    def __init__(self):
        self.steps = make_variable(np.int64(0))
        self.bytes_sent, self.bytes_uncompressed = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.total_bytes_sent, self.total_bytes_uncompressed = make_variable(np.int64(0)), make_variable(np.int64(0))
        self.exchanges: Dict = {}


class VariableState:
    """One variable's memory and last factor. It lives as long as the variable.

    An n x m matrix; factors are kept transposed, P as (r, n) and Q as (r, m). The dtype of all of them is float64 for
    float64 variables, else float32. Memory and factors are None where the variable is not compressed.

    Attributes:
        name: of the variable.
        random_key: a string variable that chooses the starting Q: the seed and the name, or what the variable is called
            on another worker, if that has gone farther.
        config: with which it is exchanged.
        process_set: with which it is exchanged.
        layout: of the variable.
        clock: of the variables that it is exchanged with.
        memory: (n, m) variable, zeros at first; None without error feedback.
        factor: the last averaged factor, a variable of (r, m), or of (r, n) where factor_is_q is false.
        factor_is_q: True, or a boolean variable where P and Q alternate.
        own: a variable like factor: this worker's last factor; empty before the first step.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: tf.DType,
        config: PowerSGD,
        process_set: ProcessSet,
        clock: Clock,
    ):
        self.name, self.config, self.process_set, self.clock = name, config, process_set, clock
        self.layout = layout_of(shape, config, trailing_columns)
        self.variable_dtype = dtype
        self.dtype = tf.float64 if dtype == tf.float64 else tf.float32
        self.random_key = self.memory = self.factor = self.factor_is_q = self.own = None
        if self.layout.compressed:
            key = random_key(name, config.seed)
            with tf.device("cpu"):
                self.random_key = make_variable(np.array(key, object))
            rows, columns = self.layout.matrix_shape
            alternates = config.num_iters_per_step % 2 == 1
            shape = (self.layout.amount, None if alternates else columns)
            random_q = np.ascontiguousarray(random_factor(key, columns, self.layout.amount).T, self.dtype.as_numpy_dtype)
            self.factor = make_variable(random_q, shape)
            self.factor_is_q = make_variable(np.bool_(True)) if alternates else True
            empty = np.zeros((self.layout.amount, 0), self.dtype.as_numpy_dtype)
            self.own = make_variable(empty, (self.layout.amount, None))
            if config.error_feedback:
                self.memory = make_variable(np.zeros((rows, columns), self.dtype.as_numpy_dtype))

    def rename(self, name: str) -> None:
        """Gives it the name that it was saved with: Keras can give a variable another path when it loads a model."""
        self.name = name
        if self.random_key is not None:
            self.random_key.assign(random_key(name, self.config.seed))

    def residual(self) -> Optional[float]:
        """|e| / |delta| of the last step; None where there was none or no memory is kept."""
        if self.memory is None or self.own.shape[1] == 0 or not tf.size(self.own):
            return None
        return residual(*(float(tf.norm(tf.cast(t, tf.float64))) for t in (self.memory, self.own)))

    def state_dict(self) -> Dict[str, object]:
        """What is kept, as numpy arrays."""
        state: Dict[str, object] = {"shape": list(self.layout.shape)}
        if self.layout.compressed:
            state.update(
                factor=self.factor.numpy(),
                factor_is_q=bool(self.factor_is_q),
                memory=None if self.memory is None else self.memory.numpy(),
            )
        return state

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        """Takes a saved factor and the sum of saved memories, times `weight`."""
        if self.layout.compressed:
            self.factor.assign(state["factor"])
            if self.factor_is_q is not True:
                self.factor_is_q.assign(state["factor_is_q"])
            self.own.assign(self.own[:, :0])
            if self.memory is not None:
                memory = sum(saved["memory"] for saved in memories) if memories else 0
                self.memory.assign(np.broadcast_to(memory * weight, self.memory.shape))


def random_key(name: str, seed: int) -> bytes:
    """What reference.initial_factor draws from, in one string."""
    return f"{seed} {name}".encode()


def random_factor(key: bytes, columns: int, rank: int, step: int = 0) -> np.ndarray:
    """reference.initial_factor: (columns, rank) float64."""
    seed, _, name = key.decode().partition(" ")
    return initial_factor(name, int(columns), int(rank), int(seed), int(step))


def make_variable(value, shape: Optional[Tuple] = None) -> tf.Variable:
    """A variable beside the model's: not trained, and in no collection. Outlives the function that is being traced."""
    shape = np.shape(value) if shape is None else shape
    with tf.init_scope():
        if tf.executing_eagerly():
            # Not tf.Variable: a tf.function that is traced again lets none be made, for fear that each trace makes one.
            return ResourceVariable(value, trainable=False, shape=tf.TensorShape(shape))
        return tf.compat.v1.Variable(
            value, trainable=False, collections=[], use_resource=True, shape=tf.TensorShape(shape)
        )


def native(variable) -> tf.Variable:
    """The tf.Variable of a Keras 3 variable, and any other itself."""
    return variable.value if hasattr(variable, "path") and hasattr(variable, "value") else variable


def states_of(variables: Sequence, config: PowerSGD, process_set: ProcessSet) -> List[VariableState]:
    """The variables' states, made where they have none. In an order that is the same on every worker."""
    key = config, process_set.process_set_id
    kept = [vars(native(variable)).setdefault(ATTRIBUTE, {}) for variable in variables]
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
    """The states that variables have already."""
    return [state for v in variables for state in getattr(native(v), ATTRIBUTE, {}).values()]


def plain_name(name: str) -> str:
    """What is the same on all workers of a Keras variable's name: not the layers that it belongs to, which Keras counts
    from the first that a process makes, and names anew when it loads a model."""
    return re.sub(r"_\d+$", "", name.rpartition("/")[2])


def _name(variable) -> str:
    return variable.path if hasattr(variable, "path") else variable.name.partition(":")[0]


def _unused(name: str, used) -> str:
    candidates = (f"{name}_{i}" if i else name for i in range(len(used) + 1))
    return next(candidate for candidate in candidates if candidate not in used)
