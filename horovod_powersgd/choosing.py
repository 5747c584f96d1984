"""Which exchange makes steps fastest: decisions of hvd.Auto, from numbers that all workers have alike.

Predictions only say what is worth a try, and in which order; what stays is what was faster. So a prediction that is
wrong costs some steps, and never the job.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.precision import is_horovods_fp16
from horovod_powersgd.cost import ITEMSIZE, Prediction, Work, predict, predict_plain
from horovod_powersgd.layout import layout_of
from horovod_powersgd.network import Network
from horovod_powersgd.statistics import TensorStats

# A try is over after so many seconds, and after some steps at least and at most: of steps of a millisecond or two, ten
# say little. The first of them does not count: it makes buckets and memories. Ten say enough of what is much slower.
TRY_SECONDS, LEAST_STEPS, ENOUGH_STEPS, MOST_STEPS = 0.3, 3, 10, 40
# After the first one, so many seconds' steps are reported together, at most so many: the message that follows would
# begin where a next step hides what this one does after its last message.
TOGETHER_SECONDS, TOGETHER = 0.05, 10
# A later candidate has to save this part of a step.
MARGIN = 0.03
# What promises a step that is at most so many times longer than the best that was measured is tried: predictions are
# off by as much, and a try costs little.
PROMISING = 1.3
# Those that took at most so many times what the fastest did are tried once more, before one of them stays.
CLOSE = 1.15
# Once it has chosen, steps' times are compared after so many seconds, but after FEW steps at least and PERIOD steps at
# most. It looks again where they have been CHANGE times longer or shorter than they were, and by a cycle of Horovod's,
# which is a matter of luck, twice in a row and for so long.
PERIOD_SECONDS, FEW, PERIOD = 0.3, 5, 50
CHANGE, CYCLE, ODD_SECONDS = 1.5, 1.2e-3, 0.3
# Each time for twice as long, as to look again and again costs more than it finds; until so many seconds were calm.
CALM_SECONDS = 30.0
# It looks again after so many seconds and steps, too: compressed steps do not tell that links have become faster.
AGAIN_SECONDS, AGAIN_STEPS = 120.0, 500


class Choice(NamedTuple):
    """What is exchanged how.

    Attributes:
        number: of the candidate; None: all gradients travel as they are.
        plain: the names of the tensors that travel as they are, though the candidate would compress them.
    """

    number: int | None = None
    plain: frozenset[str] = frozenset()


class Chooser:
    """Decides what the next steps exchange.

    Args:
        auto: the configuration.
        shapes: of all tensors, by name.
        matrix_shape: as layout_of's.
        plain_sets: sets of names, of which one may travel as it is while the others do not; None: any tensors may.
        period: how many steps there are between two comparisons at most.

    Attributes:
        shapes: as given; others may take their place before a look.
        choice: of the next step.
        predicted: seconds of a step, by choices.
        measured: the same, of those that were tried.
    """

    def __init__(
        self,
        auto: Auto,
        shapes: Mapping[str, tuple[int, ...]],
        matrix_shape: Callable,
        plain_sets: Sequence[frozenset[str]] | None = None,
        period: int = PERIOD,
    ):
        self._auto, self.shapes, self._matrix_shape, self._plain_sets = auto, shapes, matrix_shape, plain_sets
        self._period = period
        self.choice = Choice()
        self.predicted: dict[Choice, float] = {}
        self.measured: dict[Choice, float] = {}
        # Of this try's reports: (steps, seconds of each).
        self._times: list[tuple[int, float]] = []
        self._untried: list[Choice] | None = None  # None: nothing is predicted yet
        # Those that are to be tried once more; None: it is not known yet which.
        self._close: list[Choice] | None = None
        # What a step takes since the choice was made, and what it took when it was last reported.
        self._expected: float | None = None
        self._latest = 0.0
        # How often in a row it was another one than expected, and seconds; steps, and seconds, since that is expected.
        self._odd, self._odd_seconds, self._steps, self._age = 0, 0.0, 0, 0.0
        # For how many seconds they have to be others.
        self._patience = ODD_SECONDS

    @property
    def is_settled(self) -> bool:
        """Whether the choice stays, and steps are only compared."""
        return self._expected is not None

    @property
    def interval(self) -> int:
        """After how many steps to `report`."""
        if not self.is_settled:
            return 1 if not self._times else max(1, min(TOGETHER, int(TOGETHER_SECONDS / self._times[-1][1])))
        return max(FEW, min(self._period, round(PERIOD_SECONDS / self._latest)))

    def settle(self, choice: Choice) -> None:
        """Begins with a choice that was made before, perhaps elsewhere."""
        self.choice = choice

    def report(self, seconds: float, calibrate: Callable[[], tuple[Network, Sequence[Work]] | None]) -> Choice:
        """Takes what a step took since the last report, and gives the choice for the next ones.

        Args:
            seconds: of the slowest worker: its median of several steps.
            calibrate: measures the network, and the work of each candidate; is called now and then. Gives None where
                it cannot now: then the choice stays until it can.
        """
        if self._expected is not None:
            steps = self.interval
            self._steps, self._age = self._steps + steps, self._age + steps * seconds
            is_old = self._age >= AGAIN_SECONDS and self._steps >= AGAIN_STEPS
            ratio, difference = seconds / self._expected, abs(seconds - self._expected)
            changed = difference > CYCLE and not 1 / CHANGE < ratio < CHANGE
            self._latest = seconds
            self._odd = self._odd + 1 if changed else 0
            self._odd_seconds = self._odd_seconds + steps * seconds if changed else 0.0
            if self._age >= CALM_SECONDS:
                self._patience = ODD_SECONDS
            is_odd = self._odd >= 2 and self._odd_seconds >= self._patience
            if not is_odd and (changed or not is_old):
                return self.choice
            found = calibrate()
            if found is None:
                return self.choice
            self._patience *= 2
            self.measured, self._expected, self._close = {self.choice: seconds}, None, None
            self._look(*found)
        else:
            self._times.append((self.interval, seconds))
            if not self._tried():
                return self.choice
            typical = self._typical()
            self.measured[self.choice] = (self.measured.get(self.choice, typical) + typical) / 2
            if self._untried is None:
                found = calibrate()
                if found is None:
                    self._times = []
                    return self.choice
                self._look(*found)
        self._go_on()
        return self.choice

    def told(self, stats: TensorStats, compressor: Compressor) -> TensorStats:
        """What is told of a tensor.

        Args:
            stats: of it, as the compressor would have it.
            compressor: of the last candidate that was taken.
        """
        choice = self.choice
        if stats.compressed and (choice.number is None or stats.name in choice.plain):
            is_known = self.predicted or choice.number is not None
            reason = "would take longer compressed" if is_known else "nothing has been compared yet"
            stats = replace(stats, rank=0, compressed=False, reason=reason, residual=0.0)
        return replace(
            stats,
            chosen=repr(compressor) if stats.compressed else "none",
            predicted_step=self.predicted.get(choice),
            measured_step=self.measured.get(choice),
        )

    def _tried(self) -> bool:
        """Whether enough is known of what this choice's steps take."""
        steps = sum(number for number, _ in self._times)
        if steps < LEAST_STEPS:
            return False
        best = min(self.measured.values(), default=math.inf)
        is_slow = steps >= ENOUGH_STEPS and self._typical() > PROMISING * best
        taken = sum(number * seconds for number, seconds in self._times[1:])
        return is_slow or steps >= MOST_STEPS or taken >= TRY_SECONDS

    def _typical(self) -> float:
        """Seconds of a step of this try. Of two, the shorter one: what disturbs steps makes them longer."""
        return statistics.median_low([seconds for number, seconds in self._times[1:] for _ in range(number)])

    def _go_on(self) -> None:
        """Tries the most promising one that is left, or settles for the best."""
        assert self._untried is not None
        self._times = []
        if self._untried and self.predicted[self._untried[0]] < min(self.measured.values()) * PROMISING:
            self.choice = self._untried.pop(0)
            return
        self._untried = []
        # In the order of care.
        order = sorted(self.measured, key=_in_order)
        if self._close is None:
            most = CLOSE * min(self.measured.values())
            close = [choice for choice in order if self.measured[choice] <= most]
            self._close = close if len(close) > 1 else []
        if self._close:
            self.choice = self._close.pop(0)
            return
        best = order[0]
        for choice in order[1:]:
            if self.measured[choice] < self.measured[best] * (1 - MARGIN):
                best = choice
        self.choice, self._expected, self._latest = best, self.measured[best], self.measured[best]
        self._odd, self._odd_seconds, self._steps, self._age = 0, 0.0, 0, 0.0

    def _look(self, network: Network, works: Sequence[Work]) -> None:
        """Predicts all choices, from what this one's steps have taken."""
        choices = {self.choice, Choice(), *self.measured}
        for number, compressor in enumerate(self._auto.candidates):
            choices |= self._promising(number, compressor, network, works[number])
        predictions = {choice: self._prediction(choice, network, works) for choice in choices}
        measured, exchange = self.measured[self.choice], predictions[self.choice].step(0.0)
        # What a step takes beside the exchange is backward; where it takes less, so will the others' exchanges.
        backward, scale = max(0.0, measured - exchange), min(1.0, measured / exchange)
        # To the microsecond, in an order that is the same in every process: sets of names have none.
        self.predicted = {
            choice: round(scale * predictions[choice].step(backward), 6) for choice in sorted(choices, key=_in_order)
        }
        self._untried = sorted(self.predicted.keys() - self.measured.keys(), key=_in_order)
        self._untried.sort(key=self.predicted.__getitem__)

    def _promising(self, number: int, compressor: Compressor, network: Network, work: Work) -> set[Choice]:
        """The best choice with a candidate; none where it would compress nothing."""
        if is_horovods_fp16(compressor):
            return {Choice(number)}
        # What a byte more costs beside others.
        nbytes = ITEMSIZE * max(1, sum(map(math.prod, self.shapes.values())))
        per_byte = (network.allreduce(nbytes) - network.allreduce(0)) / nbytes
        layouts = {name: layout_of(shape, compressor, self._matrix_shape) for name, shape in self.shapes.items()}
        lost = {}  # seconds, by its being compressed
        for name, layout in layouts.items():
            if layout.compressed:
                sent = compressor.message_bytes(*layout.matrix, ITEMSIZE, compressor.warmup_steps + 1)
                saved = (ITEMSIZE * math.prod(layout.shape) - sent) * per_byte
                lost[name] = work.seconds([layout.matrix], 0) - saved
        if self._plain_sets is None:
            plain = frozenset(name for name, seconds in lost.items() if seconds > 0)
        else:
            sets = [lost.keys() & plain for plain in (*self._plain_sets, lost.keys())]
            plain = frozenset(min(sets, key=lambda plain: sum(lost[name] for name in lost.keys() - plain)))
        return {Choice(number, plain)} if len(plain) < len(lost) else set()

    def _prediction(self, choice: Choice, network: Network, works: Sequence[Work]) -> Prediction:
        shapes = list(self.shapes.values())
        if choice.number is None:
            return predict_plain(shapes, network)
        compressor, work = self._auto.candidates[choice.number], works[choice.number]
        places = [i for i, name in enumerate(self.shapes) if name in choice.plain]
        return predict(shapes, compressor, network, work, self._matrix_shape, places)


def _in_order(choice: Choice) -> tuple[int, list[str]]:
    """Of care: gradients as they are first."""
    return -1 if choice.number is None else choice.number, sorted(choice.plain)
