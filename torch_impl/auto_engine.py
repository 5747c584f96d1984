"""The exchange of an optimizer whose compressor is chosen while the job runs: hvd.Auto."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from horovod_powersgd.checkpoint import Share
from horovod_powersgd.choosing import Choice, Chooser
from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.compressors.precision import is_horovods_fp16
from horovod_powersgd.cost import Work
from horovod_powersgd.layout import leading_rows
from horovod_powersgd.network import Network
from horovod_powersgd.statistics import TensorStats
from horovod_powersgd.torch.calibration import Calibration
from horovod_powersgd.torch.compressed_gradient import CompressedGradient
from horovod_powersgd.torch.control_messages import begin_largest, from_worker, largest
from horovod_powersgd.torch.direct_exchange import DirectExchange
from horovod_powersgd.torch.engine import Engine
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.gradient_set import GradientSet
from horovod_powersgd.torch.workers import Workers

# A comparison takes no time of its own here, so that there may be more of them: after so many steps at most.
PERIOD = 20


class AutoEngine(Engine):
    """An Engine with gradients for each of Auto's candidates. Between two steps it can go over from one's to another's.

    Args:
        auto: the configuration; the others are Engine's.
    """

    def __init__(self, auto: Auto, workers: Workers, **kwargs):
        super().__init__(auto.candidates[0], workers, **kwargs)
        self._auto = auto
        others = [GradientSet(candidate, self._gradients.sparse_as_dense) for candidate in auto.candidates[1:]]
        self._gradient_sets += others
        self._number = 0
        # Whether the candidate's first step since it was chosen is still to come.
        self._is_new = True
        # None until the workers agree: one worker alone exchanges nothing, and has nothing to choose.
        self._chooser: Chooser | None = None
        self._last: float | None = None
        # Of the steps since the last report: what they took, and how long their gradients came. Nanoseconds of this
        # worker's that are to be compared in the next step; what waits for the slowest worker's; and those.
        self._seconds: list[float] = []
        self._spans: list[float] = []
        self._to_compare: list[int] | None = None
        self._compared: Callable[[], list[int]] | None = None
        self._slowest: list[int] | None = None
        self._direct = DirectExchange(workers, self._streams)

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        super().add(name, parameter)
        self._as_they_are |= {name}
        if self._chooser is not None:  # of a smaller model
            self._settle(self._choice)

    def _take_candidate(self, number: int) -> None:
        self._number, self._gradients, self._bucketed = number, self._gradient_sets[number], ()

    def take_over(self, other: Engine) -> None:
        """Goes on where another engine ends, with what that one has chosen."""
        if isinstance(other, AutoEngine) and other._auto == self._auto:
            self._take_candidate(other._number)
            self._settle(other._choice)
            self._is_new = other._is_new
        super().take_over(other)

    @property
    def _choice(self) -> Choice:
        return Choice() if self._chooser is None else self._chooser.choice

    def arrived(self, parameter: torch.nn.Parameter, incoming: torch.Tensor | None = None) -> None:
        # Few calls: of small models they are what a step takes.
        if self.generation is not generation() or not (self._direct.under_way or self._goes_directly()):
            super().arrived(parameter, incoming)
            return
        try:
            self._direct.arrived(parameter, incoming)
        except BaseException as error:  # Ctrl-C, too
            self._fail_directly(error)
            raise

    def _number_of_step(self) -> int:
        # Nobody knows yet how large its factors are, which may travel in half precision later.
        return 0 if self._is_new else super()._number_of_step()

    def _goes_directly(self) -> bool:
        """Whether the step's gradients all travel as they are, or as Horovod's fp16 has them; begins such a step."""
        if self._chooser is None or self._groups is not None or self._gradients.gathers:
            return False
        if self._choice.number is not None and not is_horovods_fp16(self._config):
            return False
        if self.workers.count == 1:
            return False
        with self._lock:
            if not self._direct.under_way:
                self.discard()
                self._direct.begin(self._trainable())
                self._begin_comparing()
        return True

    def finish(self, undoable: bool) -> None:
        if self.generation is generation():
            self._refuse_failed()
        else:
            self._forget_comparison()
            self._agree()  # which may choose what the others have chosen
        if self._goes_directly():
            self._finish_directly()
        else:
            super().finish(undoable)
        if self._compared is not None:
            self._slowest = self._compared()
            self._compared = None

    def _finish_directly(self) -> None:
        try:
            nbytes = self._direct.finish(self.workers.count if self._sum_gradients else 1)
            self._spans.append(self._direct.span)
            self._byte_counters.count(nbytes, nbytes, self._direct.uncompressed_bytes)
            self._pending = (), True
        except BaseException as error:
            self._fail_directly(error)
            raise
        finally:
            self.reset()

    def _fail_directly(self, error: BaseException) -> None:
        self._arriving = dict(self._direct.gradients)
        self._fail(error)

    def reset(self) -> None:
        super().reset()
        self._direct.forget()

    def commit(self) -> None:
        steps = self.steps
        super().commit()
        if self.steps > steps and self._choice.number is not None:
            self._is_new = False
        if self.steps == steps or self._chooser is None:
            self._last = None  # what the next step takes is not known
            return
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        if self._slowest is None and len(self._seconds) >= self._chooser.interval:
            nanoseconds = [int(1e9 * statistics.median(some or [0.0])) for some in (self._seconds, self._spans)]
            if self._chooser.is_settled:
                self._to_compare = nanoseconds
            else:
                self._slowest = largest(self.workers, nanoseconds, "seconds")
        if self._slowest is not None:
            seconds, span = (nanoseconds / 1e9 for nanoseconds in self._slowest)
            self._direct.expect(span)
            self._go_over(self._chooser.report(seconds, self._calibrate))
            self._seconds, self._spans, self._slowest = [], [], None
        self._last = time.perf_counter()

    def _begin(self) -> None:
        super()._begin()
        self._begin_comparing()

    def _begin_comparing(self) -> None:
        """Within a step, which all workers are in, and whose gradients it travels with: nobody waits for it, and
        nothing is on its way between two steps, when a worker may join or end."""
        if self._to_compare is not None:
            self._compared = begin_largest(self.workers, self._to_compare, "seconds")
            self._to_compare = None

    def _calibrate(self) -> tuple[Network, Sequence[Work]] | None:
        assert self._chooser is not None
        # Of the gradients that there are now, those that no choice gathers.
        dense = [gradient for gradient in self._trainable() if not gradient.sparse_dim]
        self._chooser.shapes = {gradient.name: gradient.layout.shape for gradient in dense}
        device, shapes = next(iter(self._gradients)).parameter.device, list(self._chooser.shapes.values())
        calibration = Calibration(self.workers.process_set, shapes, prefix=self.workers.prefix, device=device)
        if not (self._auto.linear or calibration.all_there()):
            return None
        works = [calibration.work(candidate) for candidate in self._auto.candidates]
        return calibration.network(gathers=not self._auto.linear), works

    def _go_over(self, choice: Choice) -> None:
        """Exchanges as this choice says, from the next step on. What memories hold goes along."""
        if choice.number is not None and choice.number != self._number:
            self._take_candidate(choice.number)
            self._is_new = True
            if self._config.keeps_memory:
                for other in self._others():
                    for mine, theirs in zip(self._gradients, other, strict=True):
                        _inherit(mine, theirs)
        self._as_they_are = set(self._gradients.shapes() if choice.number is None else choice.plain)

    def _others(self) -> list[GradientSet]:
        """Those of the other candidates."""
        return [some for some in self._gradient_sets if some is not self._gradients]

    def _begin_generation(self, root: int | None) -> None:
        self._direct.forget()
        state = self._number, self._choice, self._is_new
        number, choice, is_new = state if root is None else from_worker(self.workers, root, state)
        self._take_candidate(number)
        # Other workers are perhaps on other links: it looks again, from what was chosen.
        self._settle(choice)
        super()._begin_generation(root)
        self._is_new = is_new

    def _settle(self, choice: Choice) -> None:
        self._chooser = Chooser(self._auto, self._gradients.shapes(), leading_rows, period=PERIOD)
        self._chooser.settle(choice)
        self._go_over(choice)
        self._last = None
        self._forget_comparison()

    def _forget_comparison(self) -> None:
        self._seconds, self._spans = [], []
        self._direct.expect(0.0)
        self._to_compare = self._compared = self._slowest = None

    def _tensor_stats(self) -> tuple[TensorStats, ...]:
        chooser = self._chooser or Chooser(self._auto, {}, leading_rows)
        return tuple(chooser.told(stats, self._config) for stats in super()._tensor_stats())

    def state_dict(self) -> dict[str, object]:
        number, plain = self._choice
        chosen = None if number is None else self._auto.candidates[number].description()
        # Of a candidate without a memory, what the one before has left is saved.
        kept = next((some for some in (self._gradients, *self._others()) if some.has_memory()), self._gradients)
        state = kept.state_dict(self.workers, self.steps)
        tensors = state["tensors"]
        for gradient in itertools.chain(*self._others()):
            # Of one that this candidate does not compress: it waits for a candidate that does.
            waits = isinstance(gradient, CompressedGradient) and gradient.memory is not None
            if waits and "memory" not in tensors[gradient.name]:
                tensors[gradient.name] = gradient.state_dict()
        return {**state, "auto": {"chosen": chosen, "plain": sorted(plain)}}

    def load_state_dict(self, states: Mapping | Iterable[Mapping]) -> None:
        if not isinstance(states, Mapping):
            states = list(states)
        first = states if isinstance(states, Mapping) else next(iter(states), {})
        number = self._auto.number_of(first.get("config"))
        if number is not None:
            self._take_candidate(number)
        super().load_state_dict(states)
        # Without Auto, its compressor is what it had.
        saved = first.get("auto", {"chosen": first["config"], "plain": ()})
        choice = Choice(self._auto.number_of(saved["chosen"]), frozenset(saved["plain"]))
        self._settle(choice)
        self._is_new = choice.number is None

    def _load(self, share: Share) -> None:
        super()._load(share)
        has_room = {gradient.name for gradient in self._gradients if gradient.compressed}
        for some in self._others():
            for gradient in some:
                waiting = share.memories.get(gradient.name, ())
                if gradient.name in has_room or not some.config.keeps_memory:
                    waiting = ()
                elif gradient.compressed:
                    has_room.add(gradient.name)
                gradient.load_state_dict(gradient.state_dict(), waiting, share.weight)


def _inherit(gradient: PlainGradient, other: PlainGradient) -> None:
    """Moves a memory from another candidate's gradient of the same parameter to this one, where both have one."""
    if not (isinstance(gradient, CompressedGradient) and isinstance(other, CompressedGradient)):
        return
    if other.memory is None:
        return
    mine, theirs = gradient.state_dict(), other.state_dict()
    gradient.load_state_dict(mine, [saved for saved in (theirs, mine) if saved["memory"] is not None], 1.0)
    other.load_state_dict(theirs, [], 1.0)
