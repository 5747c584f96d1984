"""Trainings, and the states that variables have in each."""

import weakref
from collections.abc import Iterator, MutableMapping, Sequence

import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet

from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.tensorflow.auto_state import AutoState
from horovod_powersgd.tensorflow.fast_paths import gradient_class_of
from horovod_powersgd.tensorflow.step_counters import StepCounters
from horovod_powersgd.tensorflow.variable import native
from horovod_powersgd.tensorflow.variable_state import VariableState

# The variable's attribute that holds its states.
ATTRIBUTE = "_powersgd_states"


class Training:
    """What states belong to beside their variable: a new training of the same variables begins with nothing. An
    optimizer is one."""


# Tapes are made anew in each step, and go on with one training.
TAPES = Training()
# Has the states that are loaded before anything is exchanged; whatever exchanges first goes on with them.
LOADED = Training()


def states_of(
    variables: Sequence, config: Compressor, process_set: ProcessSet, training: Training
) -> list[VariableState]:
    """The variables' states in a training, made where they have none. In an order that is the same on every worker."""
    key = config, process_set.process_set_id
    kept = [_states(variable).setdefault(training, {}) for variable in variables]
    for variable, states in zip(variables, kept):
        loaded = _states(variable).get(LOADED, {})
        if key in loaded and key not in states:
            states[key] = loaded.pop(key)
    gradient_class = gradient_class_of(config)
    counters = next((states[key].counters for states in kept if key in states), None) or StepCounters()
    names = {states[key].name for states in kept if key in states}
    for variable, states in zip(variables, kept):
        if key not in states:
            name = _unused(_name(variable), names)
            names.add(name)
            with tf.device(native(variable).device):
                variable_of = name, variable.shape, native(variable).dtype
                if isinstance(config, Auto):
                    states[key] = AutoState(*variable_of, config, process_set, counters)
                else:
                    states[key] = VariableState(*variable_of, config, process_set, counters, gradient_class)
    return [states[key] for states in kept]


def known_states(variables: Sequence) -> list[VariableState]:
    """The states that variables have already, in whatever training."""
    return [state for _, state in _known(variables)]


def last_training(variables: Sequence, config: Compressor | None = None, process_set: ProcessSet | None = None):
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


def state_in(training: Training, variable, config: Compressor, process_set: ProcessSet) -> VariableState | None:
    """The variable's state in a training; None where it has none."""
    return getattr(native(variable), ATTRIBUTE, {}).get(training, {}).get((config, process_set.process_set_id))


def _states(variable) -> MutableMapping[Training, dict[tuple[Compressor, int], VariableState]]:
    return vars(native(variable)).setdefault(ATTRIBUTE, weakref.WeakKeyDictionary())


def _known(variables: Sequence) -> Iterator[tuple[Training, VariableState]]:
    for variable in variables:
        for training, states in getattr(native(variable), ATTRIBUTE, {}).items():
            for state in states.values():
                yield training, state


def _name(variable) -> str:
    return variable.path if hasattr(variable, "path") else variable.name.partition(":")[0]


def _unused(name: str, used) -> str:
    candidates = (f"{name}_{i}" if i else name for i in range(len(used) + 1))
    return next(candidate for candidate in candidates if candidate not in used)
