"""Compression that adapts itself to the phases of training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from horovod_powersgd.compressors.compressor import Compressor


@dataclass(frozen=True)
class Accordion(Compressor):
    """Compresses little while training changes fast, and much in between, each layer by itself (Agarwal et al.,
    "Adaptive Gradient Communication via Critical Learning Regime Identification", MLSys 2021, algorithm 1).

    A layer's averaged gradients are added up over an interval. After the interval, where the norm of the sum differs
    from the last interval's by `threshold` times that or more, the next interval has low compression; otherwise high.
    The first two intervals, which have nothing to be compared with, have low compression; and so has what is left of an
    interval from the step on in which the learning rate has become lower. The workers need no messages for it: what
    they compare is the same on all of them.

    It costs memory of the gradients' size. Which tensors are compressed at all is what `low` says.

    Args:
        low: the compressor for critical phases, such as PowerSGD(rank=4) or TopK(0.1).
        high: the compressor for the others, such as PowerSGD(rank=1) or TopK(0.01): the same as low but for its rank or
            ratio, which is not larger.
        threshold: above 0; the paper's eta.
        interval: steps, at least 1: usually the steps of an epoch, or of some. Required.

    Raises:
        TypeError: low or high is no compressor, or another field has a value of the wrong type.
        ValueError: low and high differ in more than rank or ratio, or a field's value is outside what is allowed.

    Example:
        >>> Accordion(PowerSGD(rank=4), PowerSGD(rank=1), interval=len(loader))
    """

    low: Compressor
    high: Compressor
    threshold: float = 0.5
    interval: int | None = None

    def __post_init__(self) -> None:
        for field in ("low", "high"):
            value = getattr(self, field)
            if not isinstance(value, Compressor) or isinstance(value, Accordion):
                raise TypeError(f"Accordion: {field} must be a compressor such as PowerSGD(rank=2), not {value!r}")
        knob = next((name for name in ("rank", "ratio") if name in vars(self.low)), None)
        if type(self.low) is not type(self.high) or knob is None:
            raise ValueError(
                "Accordion: low and high must be of one kind that has a rank or a ratio, "
                f"not {self.low!r}, {self.high!r}"
            )
        if replace(self.high, **{knob: getattr(self.low, knob)}) != self.low:
            raise ValueError(f"Accordion: low and high must differ only in {knob}, not {self.low!r}, {self.high!r}")
        if getattr(self.low, knob) < getattr(self.high, knob):
            raise ValueError(
                f"Accordion: low is the lower compression, and its {knob} must not be below high's, "
                f"not {self.low!r}, {self.high!r}"
            )
        self._check_number("threshold", "above 0", lambda threshold: threshold > 0)
        if self.interval is None:
            raise ValueError("Accordion: interval is required: how many steps there are in an epoch")
        self._check_integer("interval", at_least=1)
        # What low and high have in common is Accordion's, too.
        for name in ("linear", "low_rank", "error_feedback", "warmup_steps", "seed"):
            object.__setattr__(self, name, getattr(self.low, name))

    @property
    def family(self) -> Compressor:
        return self.low

    def obstacle(self, rows: int, columns: int) -> str | None:
        return self.low.obstacle(rows, columns)

    def amount(self, rows: int, columns: int) -> int:
        return self.low.amount(rows, columns)

    def amount_now(self, rows: int, columns: int, is_low: bool) -> int:
        """Compressor.amount with low or high compression."""
        return (self.low if is_low else self.high).amount(rows, columns)

    def message_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> int:
        """With low compression. With high compression it is what `high` says, of the matrices that `low` compresses."""
        return self.low.message_bytes(rows, columns, itemsize, step)

    def round_bytes(self, rows: int, columns: int, itemsize: int, step: int = 0) -> list[int]:
        """As message_bytes."""
        return self.low.round_bytes(rows, columns, itemsize, step)

    def quantized_rows(self, rows: int, columns: int, step: int = 0) -> list[list[int]]:
        """As message_bytes."""
        return self.low.quantized_rows(rows, columns, step)

    def description(self) -> dict[str, Any]:
        return {**super().description(), "low": self.low.description(), "high": self.high.description()}


@dataclass
class Regime:
    """What Accordion knows of one layer. The same on every worker.

    Attributes:
        total: (n, m): the sum of the averaged gradients of this interval; None for zeros.
        last_norm: of the sum of the last interval; None in the first.
        rate: the last step's learning rate; None where it is not known.
        is_low: whether the last step had low compression.
        decisions: (step, "low" or "high") of each decision.
    """

    total: Any = None
    last_norm: float | None = None
    rate: float | None = None
    is_low: bool = True
    decisions: tuple[tuple[int, str], ...] = ()

    def decided(self, config: Accordion, step: int, rate: float | None, norm) -> "Regime":
        """The regime in which a step is.

        Args:
            step: how many were exchanged before.
            rate: the learning rate in this step; None where it is not known.
            norm: gives the norm of a total.
        """
        regime = replace(self, rate=rate)
        decays = rate is not None and self.rate is not None and rate < self.rate
        assert config.interval is not None  # which __post_init__ has seen to
        if step % config.interval == 0:
            now = None if self.total is None else float(norm(self.total))
            regime.is_low = decays or is_critical(self.last_norm, now, config.threshold)
            regime.last_norm, regime.total = now, None
        elif decays and not self.is_low:
            regime.is_low = True
        else:
            return regime
        regime.decisions += ((step, "low" if regime.is_low else "high"),)
        return regime

    def state_dict(self, to_saved) -> dict:
        """Numbers, strings, and the total as `to_saved` gives it."""
        return {
            "total": None if self.total is None else to_saved(self.total),
            "last_norm": self.last_norm,
            "rate": self.rate,
            "is_low": self.is_low,
            "decisions": [list(decision) for decision in self.decisions],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping, from_saved) -> "Regime":
        """What state_dict gave."""
        total = None if state["total"] is None else from_saved(state["total"])
        return cls(**{**state, "total": total, "decisions": tuple(map(tuple, state["decisions"]))})


def is_critical(last: float | None, now: float | None, threshold: float) -> bool:
    """Whether the norm has changed so much that what follows is to be compressed less; also where the last one is zero
    or not known, or this one is not finite."""
    if last is None or now is None or not last > 0 or not math.isfinite(now):
        return True
    return abs(last - now) >= threshold * last
