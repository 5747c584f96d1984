"""The exchange of variables whose compressor is chosen while the job runs: hvd.Auto."""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from horovod_powersgd.choosing import PERIOD, Choice, Chooser
from horovod_powersgd.compressors.compressor import Traffic
from horovod_powersgd.compressors.precision import is_horovods_fp16
from horovod_powersgd.cost import Work
from horovod_powersgd.layout import trailing_columns
from horovod_powersgd.network import Network
from horovod_powersgd.statistics import TensorStats
from horovod_powersgd.tensorflow.auto_state import AutoState
from horovod_powersgd.tensorflow.calibration import Calibration, passes
from horovod_powersgd.tensorflow.chosen import ALL, MIDDLE, NOTHING_MORE, SMALL
from horovod_powersgd.tensorflow.exchange import Exchange, by_branch
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.variable import make_variable
from horovod_powersgd.tensorflow.variable_state import VariableState

# Matrices of fewer numbers may travel as they are while the others are compressed. Each size makes graphs larger; what
# these lose against a choice tensor by tensor, benchmarks/tensor_by_tensor.py predicts.
NUMBERS = {SMALL: 2**16, MIDDLE: 2**20}

# An exchange that has not been looked at for so many steps is used no more.
UNUSED = 500


class _Way(NamedTuple):
    """What a choice is in the graph.

    Attributes:
        numbers: Chosen's, of the candidate and of what travels as it is.
        choice: the Chooser's.
        states: that gradients are exchanged with.
    """

    numbers: tuple[int, int]
    choice: Choice
    states: Sequence[VariableState]


class AutoExchange(Exchange):
    """An Exchange whose graph has a branch for each choice. The end of a step notes the time, and now and then asks the
    Chooser, in Python, which branch the next steps take.

    Args: Exchange's; the states are AutoStates.
    """

    def __init__(self, settings: Settings, states: Sequence[AutoState], groups, sparse: tuple[bool, ...]):
        self._auto, self._auto_states, self._chosen = states[0].config, states, states[0].chosen
        self._shapes = {state.name: state.layout.shape for state in states}
        self._ways = _ways(states)
        # How many steps this way has had in a row, which way, and seconds of the last ones.
        self._since, self._last_way = make_variable(np.int64(0)), make_variable(np.int32(0))
        self._seconds = make_variable(np.zeros(PERIOD))
        # How many of them were timed since they were last looked at, and after how many they are.
        self._timed, self._interval = make_variable(np.int64(0)), make_variable(np.int64(1))
        # When the last step ended; 0 where what the next one takes is not known.
        self._ended = make_variable(np.float64(0))
        # Whether the workers may be others than those that the Chooser knows.
        self._new_workers = make_variable(np.bool_(True))
        self._chooser = self._new_chooser(Choice())
        super().__init__(settings, states, groups, sparse)
        alone = self._workers.alone
        shapes = list(self._shapes.values())
        self._passes = [] if alone else [passes(c, settings.process_set, shapes) for c in self._auto.candidates]

    def _new_chooser(self, choice: Choice) -> Chooser:
        sets = [
            frozenset(name for name, shape in self._shapes.items() if math.prod(shape) < numbers)
            for numbers in NUMBERS.values()
        ]
        chooser = Chooser(self._auto, self._shapes, trailing_columns, (frozenset(), *sets))
        chooser.settle(choice)
        return chooser

    def _variables(self) -> list[tf.Variable]:
        own = [value for value in vars(self).values() if isinstance(value, tf.Variable)]
        return [*super()._variables(), *self._chosen.variables().values(), *own]

    def _look(self) -> tf.Operation:
        # Those that were there before, and others, go on from the same numbers.
        numbers = {"_since": 0, "_last_way": 0, "_timed": 0, "_interval": 1, "_ended": 0.0, "_new_workers": True}
        return tf.group([getattr(self, name).assign(number, read_value=False) for name, number in numbers.items()])

    def _way(self) -> tf.Tensor:
        """The place of what was chosen among all ways."""
        places = {way.numbers: i for i, way in enumerate(self._ways)}
        table = [
            [places[0, ALL] if plain == ALL else places.get((number, plain), places[number, NOTHING_MORE])
             for plain in range(4)]
            for number in range(len(self._auto.candidates))
        ]
        numbers = [tf.convert_to_tensor(variable) for variable in self._chosen.variables().values()]
        return tf.gather_nd(tf.constant(table), tf.stack(numbers))

    def _by_branch(self, number: tf.Tensor, exchange: Callable):
        def of(place: int):
            way = self._ways[place]
            if way.choice.number is None:
                return exchange(way.states, "plain")
            prefix = "{}.{}".format(*way.numbers)
            # As a training of its own: what it has kept may be old, or nothing.
            return by_branch(
                self._auto.candidates[way.choice.number],
                self._steps_of(place),
                lambda branch, *args, **kwargs: exchange(way.states, f"{prefix}.{branch}", *args, **kwargs),
            )

        if self._workers.alone:  # and has nothing to choose
            return of(0)
        return tf.switch_case(self._way(), [functools.partial(of, place) for place in range(len(self._ways))])

    def _steps_of(self, place: int | tf.Tensor) -> tf.Tensor:
        """How many steps, up to the last one, went this way in a row."""
        return tf.where(tf.equal(place, self._last_way), self._since, tf.zeros_like(self._since))

    def _count(self, finite: tf.Tensor, traffic: Traffic, bytes_uncompressed: tf.Tensor) -> tf.Operation:
        counted = super()._count(finite, traffic, bytes_uncompressed)
        if self._workers.alone:
            return counted
        ended = tf.identity(self._ended)
        with tf.control_dependencies([counted, ended]):
            seconds = tf.timestamp() - ended
        known = finite & (ended > 0)
        times = tf.where(known, tf.concat([self._seconds[1:], [seconds]], 0), self._seconds)
        timed = self._timed + tf.cast(known, tf.int64)
        way = self._way()
        kept = [
            self._seconds.assign(times, read_value=False),
            self._since.assign(self._steps_of(way) + tf.cast(finite, tf.int64), read_value=False),
            self._last_way.assign(way, read_value=False),
        ]
        with tf.control_dependencies(kept):
            due = timed >= self._interval
            looked = tf.cond(due, lambda: self._look_at(way, times[PERIOD - timed :]), lambda: tf.constant(False))
        with tf.control_dependencies([looked]):
            # What looking takes is no part of the next step.
            return tf.group(
                self._timed.assign(tf.where(due, tf.zeros_like(timed), timed), read_value=False),
                self._ended.assign(tf.where(finite, tf.timestamp(), tf.zeros_like(ended)), read_value=False),
            )

    def _look_at(self, way: tf.Tensor, seconds: tf.Tensor) -> tf.Tensor:
        """Lets the Chooser choose, after so long steps of this way; what it says is the same on every worker."""
        given = [seconds, way, self._new_workers, self.counters.steps, *self._chosen.variables().values()]
        found = tf.numpy_function(self._report, [tf.convert_to_tensor(one) for one in given], [tf.int64] * 3)
        candidate, plain, interval = (tf.ensure_shape(number, ()) for number in found)
        assigned = [
            self._chosen.candidate.assign(candidate, read_value=False),
            self._chosen.plain.assign(plain, read_value=False),
            self._interval.assign(interval, read_value=False),
            self._new_workers.assign(False, read_value=False),
        ]
        with tf.control_dependencies(assigned):
            return tf.constant(True)

    def _report(
        self, seconds: np.ndarray, way: int, new_workers: bool, steps: int, candidate: int, plain: int
    ) -> tuple[np.int64, np.int64, np.int64]:
        """Chosen's numbers for the next steps; and after how many of them it is asked again."""
        if not self._decides(new_workers, steps):
            return np.int64(candidate), np.int64(plain), np.int64(PERIOD)
        choice = self._ways[way].choice
        if new_workers or choice != self._chooser.choice:  # which a checkpoint has brought
            self._chooser = self._new_chooser(choice)
        # A session of TensorFlow 1 runs no op at once, unless it is told to.
        with context.eager_mode():
            calibration = Calibration(
                self._workers.process_set,
                list(self._shapes.values()),
                prefix=self._workers.prefix,
                device=self._workers.device,
            )
            [slowest] = calibration.largest([int(1e9 * statistics.median(seconds.tolist()))])
            choice = self._chooser.report(slowest / 1e9, functools.partial(self._calibrate, calibration))
        number, plain = next(way.numbers for way in self._ways if way.choice == choice)
        # Of gradients as they are, the last candidate stays the one whose state counts.
        return np.int64(candidate if plain == ALL else number), np.int64(plain), np.int64(self._chooser.interval)

    def _decides(self, new_workers: bool, steps: int) -> bool:
        """Whether what this exchange's steps take tells what is chosen. Of those that have variables in common, it is
        the one of most variables, as long as it is used: the others take what it has chosen."""
        chosen = self._chosen
        decider = None if new_workers else chosen.decider
        if decider is None or len(decider.states) < len(self.states) or abs(steps - chosen.decided) > UNUSED:
            decider = self
        if decider is self:
            chosen.decider, chosen.decided = self, steps
        return decider is self

    def _calibrate(self, calibration: Calibration) -> tuple[Network, Sequence[Work]] | None:
        if not (self._auto.linear or calibration.all_there()):
            return None
        mine = [int(1e9 * seconds) for samples in self._passes for _, seconds in samples]
        slowest = iter(calibration.largest(mine))
        works = [Work.fitted([(shapes, next(slowest) / 1e9) for shapes, _ in samples]) for samples in self._passes]
        return calibration.network(gathers=not self._auto.linear), works

    def _tensor_stats(self, state: VariableState, sparse: bool, warming_up: bool) -> TensorStats:
        assert isinstance(state, AutoState)
        way = self._ways[int(self._way())].choice
        chooser = (self._chosen.decider or self)._chooser
        if chooser.choice != way:
            chooser = self._new_chooser(way)
        return chooser.told(super()._tensor_stats(state.current, sparse, False), state.current.config)


def _ways(states: Sequence[AutoState]) -> list[_Way]:
    """All that can be chosen; gradients as they are first."""
    found = [_Way((0, ALL), Choice(), states)]
    for number, candidate in enumerate(states[0].config.candidates):
        mine = [state.candidates[number] for state in states]
        compressed = {state.name for state in mine if state.layout.compressed}
        found.append(_Way((number, NOTHING_MORE), Choice(number), mine))
        last = set[str]()
        for plain, numbers in NUMBERS.items() if not is_horovods_fp16(candidate) else ():
            some = {state.name for state in mine if math.prod(state.layout.shape) < numbers} & compressed
            if len(last) < len(some) < len(compressed):
                large = [whole if whole.name in some else of_one for whole, of_one in zip(states, mine)]
                found.append(_Way((number, plain), Choice(number, frozenset(some)), large))
            last = some
    return found
