"""A choice among compressors that is made while the job runs."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.compressors.precision import HOROVODS_FP16, HOROVODS_NONE, NoCompression


@dataclass(frozen=True, init=False)
class Auto(Compressor):
    """Takes what makes steps fastest: gradients as they are, or one of these compressors for those that it pays for.

    The first steps are exchanged as they are, and timed. Then messages and passes are measured, in a quarter of a
    second or so, and every candidate's step is predicted; those that promise not to be much slower are tried for some
    steps, and the fastest stays (horovod_powersgd.choosing). All workers choose alike. When steps become slower or
    faster, and now and then, it looks again.

    Args:
        candidates: compressors, or Horovod's Compression.none or Compression.fp16, the more careful ones first: a later
            one has to be faster to be taken. Gradients as they are always are one of them. By default Compression.fp16
            and PowerSGD(rank=8).

    Raises:
        TypeError: a candidate is none of these.
        ValueError: no candidate compresses; one has phases of its own: Accordion, warm-up steps, or two levels; or they
            have several memory_dtypes, though they share a memory.

    Example:
        >>> Auto(PowerSGD(rank=8, wire_dtype="int8"))
    """

    candidates: tuple[Compressor, ...]

    def __init__(self, *candidates: Any):
        found = tuple(map(_candidate, candidates or (HOROVODS_FP16, PowerSGD(rank=8))))
        compressing = tuple(candidate for candidate in found if not isinstance(candidate, NoCompression))
        if not compressing:
            raise ValueError("Auto: there is nothing to choose from: give a candidate that compresses")
        memory_dtypes = {candidate.memory_dtype for candidate in compressing if candidate.keeps_memory}
        if len(memory_dtypes) > 1:
            raise ValueError(f"Auto: the candidates share one memory: give them one memory_dtype, not {memory_dtypes}")
        object.__setattr__(self, "candidates", compressing)
        for name, value in {
            "memory_dtype": next(iter(memory_dtypes), None),
            "linear": all(c.linear for c in found),
            "error_feedback": any(c.error_feedback for c in found),
        }.items():
            object.__setattr__(self, name, value)

    def description(self) -> dict[str, Any]:
        numbered = {f"candidate {i}": candidate.description() for i, candidate in enumerate(self.candidates)}
        return {"compressor": "Auto", **numbered}

    def number_of(self, description: Any) -> int | None:
        """Of the candidate that has this description; None where none has."""
        found = [candidate.description() for candidate in self.candidates]
        return found.index(description) if description in found else None

    def exchange(self, delta, state) -> Generator[Any, Any, Any]:
        """Not to be called: a step is one of the candidates'."""
        raise NotImplementedError("Auto exchanges as one of its candidates does")


def _candidate(given: Any) -> Compressor:
    if isinstance(given, Compressor):
        if isinstance(given, (Accordion, Auto)) or given.warmup_steps or given.hierarchical:
            raise ValueError(
                f"Auto: {given!r} has phases of its own: give compressors without Accordion, warmup_steps or "
                "hierarchical"
            )
        return given
    # Horovod's own, of either framework; this package imports neither.
    known = {"NoneCompressor": HOROVODS_NONE, "FP16Compressor": HOROVODS_FP16}
    name = getattr(given, "__name__", "")
    if hasattr(given, "decompress") and name in known:
        return known[name]
    raise TypeError(f"Auto: a candidate is a compressor, or Horovod's Compression.none or .fp16, not {given!r}")
