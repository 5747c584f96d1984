"""The configuration of PowerSGD, one for every framework."""

import math
import numbers
from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class PowerSGD:
    """PowerSGD gradient compression (Vogels, Karimireddy, Jaggi, NeurIPS 2019, Algorithms 1 and 2).

    Pass it as ``compression`` to DistributedOptimizer. All workers must use the same values.

    Args:
        rank: columns of the factors P and Q, at least 1. Higher: more accurate, more bytes. A matrix with fewer
            rows or columns than this uses its smaller side.
        min_compression_rate: a matrix is compressed when its factors hold at least this many times fewer numbers
            than it does, and is averaged as it is otherwise. Lower: more tensors compressed. 0 compresses every matrix.
        num_iters_per_step: half-steps of the subspace iteration per step, each with one allreduce. 2 is the paper
            (P, then Q); 1 alternates between P and Q from step to step, which halves the bytes; more half-steps come
            closer to the best approximation of that rank.
        warmup_steps: this many first steps are exchanged uncompressed.
        warm_start: start each step from the last step's factor (paper, section 3). Without it, every step starts
            from a fresh random Q.
        error_feedback: add what one step's compression left out to the next step's gradient (paper, section 3).
            It costs memory of the gradients' size; without it the results are biased.
        wire_dtype: None: factors travel in the precision that they are computed in. "float16": they travel in half
            precision; what their rounding loses stays in the error-feedback memory.
        seed: of the random starting Q, a non-negative integer.

    Raises:
        TypeError: a field has a value of the wrong type.
        ValueError: a field's value is outside what is allowed.

    Example:
        >>> PowerSGD(rank=2).rank
        2
    """

    rank: int = 4
    min_compression_rate: float = 2.0
    num_iters_per_step: int = 2
    warmup_steps: int = 0
    warm_start: bool = True
    error_feedback: bool = True
    wire_dtype: Optional[str] = None
    seed: int = 0

    def __post_init__(self):
        self._check_integer("rank", at_least=1)
        self._check_integer("num_iters_per_step", at_least=1)
        self._check_integer("warmup_steps", at_least=0)
        self._check_integer("seed", at_least=0)
        self._check_bool("warm_start")
        self._check_bool("error_feedback")
        rate = self.min_compression_rate
        if not isinstance(rate, numbers.Real) or isinstance(rate, bool):
            raise TypeError(f"PowerSGD: min_compression_rate must be a number, 0 or more, not {rate!r}")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"PowerSGD: min_compression_rate must be a finite number, 0 or more, not {rate!r}")
        object.__setattr__(self, "min_compression_rate", float(rate))
        if self.wire_dtype is not None and not isinstance(self.wire_dtype, str):
            raise TypeError(f"PowerSGD: wire_dtype must be None or 'float16', not {self.wire_dtype!r}")
        if self.wire_dtype not in (None, "float16"):
            raise ValueError(f"PowerSGD: wire_dtype must be None or 'float16', not {self.wire_dtype!r}")

    def _check_integer(self, field: str, at_least: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"PowerSGD: {field} must be an integer, {at_least} or more, not {value!r}")
        if value < at_least:
            raise ValueError(f"PowerSGD: {field} must be {at_least} or more, not {value!r}")
        # The workers compare their configurations' texts, and a checkpoint holds them: plain numbers only.
        object.__setattr__(self, field, int(value))

    def _check_bool(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, bool):
            raise TypeError(f"PowerSGD: {field} must be True or False, not {value!r}")
