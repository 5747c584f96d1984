"""What is kept of a variable whose compressor is chosen while the job runs: hvd.Auto."""

from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.compressors.precision import NoCompression
from horovod_powersgd.tensorflow.chosen import Chosen
from horovod_powersgd.tensorflow.fast_paths import gradient_class_of
from horovod_powersgd.tensorflow.variable_state import VariableState


class AutoState(VariableState):
    """The state of a variable that travels as it is, and beside it one for each of Auto's candidates. They share one
    memory: it goes along from one candidate to the next, and waits where the gradient travels as it is.

    Attributes:
        candidates: the states with them.
        chosen: for the variables that this one is exchanged with.
    """

    def __init__(self, name, shape, dtype, config: Auto, process_set, counters):
        alone = name, shape, dtype, NoCompression(), process_set, counters
        super().__init__(*alone, gradient_class_of(alone[3]))
        self.config: Auto = config
        self.candidates: list[VariableState] = []
        for candidate in config.candidates:
            state = VariableState(
                name, shape, dtype, candidate, process_set, counters, gradient_class_of(candidate), self
            )
            self.candidates.append(state)
            if state.memory is not None:
                self.memory, self.memory_unit = state.memory, state.memory_unit
                self.usual_clipping = state.usual_clipping
        if counters.chosen is None:
            counters.chosen = Chosen(config)
        self.chosen: Chosen = counters.chosen

    @property
    def current(self) -> VariableState:
        return self.candidates[int(self.chosen.candidate)]

    @property
    def keeping(self) -> VariableState:
        memories = (state for state in (self.current, *self.candidates) if state.config.keeps_memory)
        return next(memories, self.current)

    def saved(self) -> dict[str, object]:
        found = self.keeping.state_dict()
        if "memory" in found or self.memory is None:
            return found
        return self._with_memory.state_dict()

    def load_state_dict(self, state: Mapping, memories: Sequence[Mapping], weight: float) -> None:
        self.current.load_state_dict(state, memories, weight)
        if self.current.memory is None and self.memory is not None:
            self._with_memory.load_memory(state, memories, weight)

    @property
    def _with_memory(self) -> VariableState:
        """Of a candidate that compresses the variable, and keeps a memory."""
        return next(state for state in self.candidates if state.memory is not None)

    def shared(self) -> dict[str, tf.Variable]:
        return self._together(state.shared() for state in self.candidates)

    def shared_with_keys(self) -> dict[str, tf.Variable]:
        return self._together(state.shared_with_keys() for state in self.candidates)

    def variables(self) -> dict[str, tf.Variable]:
        return self._together(state.variables() for state in self.candidates)

    def _together(self, everyones: Iterable[dict[str, tf.Variable]]) -> dict[str, tf.Variable]:
        """Each variable once, by the candidate's number and the name that it has there."""
        found = {}
        for number, variables in enumerate(everyones):
            for name, variable in variables.items():
                of_all = any(variable is one for one in (self.memory, self.memory_unit, self.usual_clipping))
                found[name if of_all else f"{number}.{name}"] = variable
        return found

    def rename(self, name: str) -> None:
        self.name = name
        for state in self.candidates:
            state.rename(name)

    def begin_again(self) -> None:
        for state in self.candidates:
            state.begin_again()
        self.chosen.begin_again()
