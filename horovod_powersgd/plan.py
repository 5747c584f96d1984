"""What each way of exchanging a model's gradients would take, and which to choose."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.compressors.precision import HOROVODS_FP16, Int8
from horovod_powersgd.cost import Prediction, Work, predict, predict_plain
from horovod_powersgd.layout import layout_of
from horovod_powersgd.network import Network
from horovod_powersgd.shapes import Tensors, numbers

# By the argument that users write. None is no compression.
SETTINGS: dict[str, Compressor | None] = {
    "hvd.Compression.none": None,
    "hvd.Compression.fp16": HOROVODS_FP16,
    "hvd.Int8()": Int8(),
    "hvd.PowerSGD(rank=1)": PowerSGD(1),
    "hvd.PowerSGD(rank=4)": PowerSGD(4),
    "hvd.PowerSGD(rank=8)": PowerSGD(8),
    'hvd.PowerSGD(rank=8, wire_dtype="int8")': PowerSGD(8, wire_dtype="int8"),
    'hvd.PowerSGD(rank=32, wire_dtype="int8")': PowerSGD(32, wire_dtype="int8"),
}
PLAIN, HALVES = list(SETTINGS)[:2]
# Those that are shown in two levels as well, where several workers share each host: for the memory; none of these is
# recommended.
IN_TWO_LEVELS = ["hvd.PowerSGD(rank=8)", 'hvd.PowerSGD(rank=32, wire_dtype="int8")']
# Those that end trainings as well as plain SGD, the more careful first: one of them is recommended. Models of LARGE
# numbers and more need a higher rank than others: docs/evidence.md has some of 4 million, and of 29 and 40.
CAREFUL = [PLAIN, HALVES, "hvd.Int8()", "hvd.PowerSGD(rank=8)", 'hvd.PowerSGD(rank=8, wire_dtype="int8")']
CAREFUL_OF_LARGE = [*CAREFUL[:3], 'hvd.PowerSGD(rank=32, wire_dtype="int8")']
LARGE = 20_000_000
# A faster one has to save this part of a step to be recommended in place of a more careful one.
WORTH = 0.1
# What PyTorch's steps take of one core of an AMD Zen 4 server, as torch_impl/calibration.py measures them: where there
# is no Horovod, so that nothing is measured.
TYPICAL_WORK = {
    HALVES: Work(4e-6, 1e-10),
    "hvd.Int8()": Work(9e-5, 2e-10),
    "hvd.PowerSGD(rank=1)": Work(8e-5, 2e-10),
    "hvd.PowerSGD(rank=4)": Work(8e-5, 2.4e-10),
    "hvd.PowerSGD(rank=8)": Work(1e-4, 3e-10),
    'hvd.PowerSGD(rank=8, wire_dtype="int8")': Work(1.2e-4, 3e-10),
    'hvd.PowerSGD(rank=32, wire_dtype="int8")': Work(3.5e-4, 8.3e-10),
}


class Option(NamedTuple):
    """A setting, and what it is predicted to take.

    Attributes:
        setting: as users write it.
        compressor: that it asks for; None: none.
        prediction: of one exchange.
        step: seconds of a step with the backward that was asked for.
    """

    setting: str
    compressor: Compressor | None
    prediction: Prediction
    step: float


@dataclass(frozen=True)
class Plan:
    """The options, the recommended one, and why.

    Attributes:
        tensors: of the model.
        network: between the workers.
        backward: seconds of a step's computing.
        options: all of SETTINGS, and on hosts of several workers those with two levels.
    """

    tensors: Tensors
    network: Network
    backward: float
    options: Sequence[Option]

    @classmethod
    def of(cls, tensors: Tensors, network: Network, works: dict[str, Work], backward: float = 0.0) -> "Plan":
        """From what was measured.

        Args:
            works: of each setting but PLAIN.
        """
        shapes, options = list(tensors.shapes.values()), []
        for setting, compressor, measured in _settings(network):
            if compressor is None:
                prediction = predict_plain(shapes, network)
            else:
                prediction = predict(shapes, compressor, network, works[measured], tensors.matrix_shape)
            options.append(Option(setting, compressor, prediction, prediction.step(backward)))
        return cls(tensors, network, backward, options)

    def option(self, setting: str) -> Option:
        """The one of a setting."""
        return next(option for option in self.options if option.setting == setting)

    @property
    def recommended(self) -> Option:
        """The most careful one that is not much slower than the fastest of the careful ones."""
        is_large = numbers(self.tensors) >= LARGE
        careful = [self.option(setting) for setting in (CAREFUL_OF_LARGE if is_large else CAREFUL)]
        least = min(option.step for option in careful)
        return next(option for option in careful if option.step <= least * (1 + WORTH))

    def reason(self) -> str:
        """Why that is recommended, in a sentence."""
        best, plain = self.recommended, self.option(PLAIN)
        if self.network.workers == 1:
            return "one worker exchanges nothing: compression only takes time"
        if best.setting == PLAIN:
            return "no setting that keeps quality saves a tenth of plain Horovod's step"
        saved = 1 - best.step / plain.step
        return (
            f"a step takes {_ms(best.step)} ms in place of plain Horovod's {_ms(plain.step)}, {saved:.0%} less, "
            "and trainings end as well (docs/evidence.md)"
        )

    def compressed(self, setting: str) -> list[str]:
        """Names of the tensors that travel compressed."""
        compressor = self.option(setting).compressor
        if compressor is None or setting == HALVES:
            return []
        layouts = {n: layout_of(s, compressor, self.tensors.matrix_shape) for n, s in self.tensors.shapes.items()}
        return [name for name, layout in layouts.items() if layout.compressed]

    @property
    def _per_host(self) -> int | None:
        """How many workers share each host; None where an exchange would have one level."""
        return None if self.network.hosts is None else self.network.hosts.per_host

    def as_json(self) -> str:
        """All of it; seconds and bytes."""
        plain, halves = self.option(PLAIN), self.option(HALVES)
        options = [
            {
                "setting": option.setting,
                "step_seconds": option.step,
                "times_faster_than_horovod": plain.step / option.step if option.step else 1.0,
                "times_faster_than_fp16": halves.step / option.step if option.step else 1.0,
                "compressed_tensors": self.compressed(option.setting),
                "seconds": option.prediction.seconds,
                **option.prediction._asdict(),
            }
            for option in self.options
        ]
        whole = {
            "workers": self.network.workers,
            "workers_per_host": self._per_host,
            "parameters": numbers(self.tensors),
            "tensors": len(self.tensors.shapes),
            "backward_seconds": self.backward,
            "options": options,
            "recommended": self.recommended.setting,
            "reason": self.reason(),
        }
        return json.dumps(whole, indent=1)

    def as_table(self) -> str:
        """For people."""
        plain, halves = self.option(PLAIN), self.option(HALVES)
        width = 2 + max(len(option.setting) for option in self.options)
        line = f"{{:<{width}}}{{:>8}}{{:>12}}{{:>12}}{{:>10}}{{:>10}}{{:>12}}"
        head = line.format("compression=", "tensors", "MB sent", "step, ms", "faster", "than fp16", "memory, MB")
        rows = [
            line.format(
                option.setting,
                option.prediction.compressed or "",
                f"{option.prediction.bytes_sent / 1e6:.2f}",
                _ms(option.step),
                _times(plain.step, option.step),
                _times(halves.step, option.step),
                f"{option.prediction.memory / 1e6:.0f}" if option.prediction.memory else "",
            )
            for option in self.options
        ]
        kept = [name for name in self.tensors.shapes if name not in self.compressed(self.recommended.setting)]
        some = ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        on_hosts = f" on hosts of {self._per_host}" if self._per_host else ""
        lines = [
            f"{numbers(self.tensors):,} parameters in {len(self.tensors.shapes)} tensors, "
            f"{self.network.workers} workers{on_hosts}, a backward of {_ms(self.backward)} ms",
            "", head, *rows, "", f"compression={self.recommended.setting}: {self.reason()}.",
        ]  # fmt: skip
        if self.recommended.setting not in (PLAIN, HALVES) and kept:
            lines.append(f"Averaged as they are: {some}.")
        if on_hosts:
            lines.append("hierarchical=True: the workers of a host share one memory (docs/compressors.md, two levels).")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws the steps' times as bars.

        Raises:
            ImportError: matplotlib is not installed.
        """
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(self.options) + 1.2), layout="constrained")
        best = self.recommended.setting
        colors = ["#0072B2" if option.setting == best else "#999999" for option in self.options]
        settings, steps = [option.setting for option in self.options], [1e3 * option.step for option in self.options]
        axes.barh(settings, steps, color=colors)
        axes.invert_yaxis()
        axes.set_xlabel(f"predicted milliseconds of a step, {self.network.workers} workers")
        figure.savefig(path)
        pyplot.close(figure)


def _settings(network: Network) -> Iterator[tuple[str, Compressor | None, str]]:
    """What is compared: a setting, its compressor, and the one of SETTINGS whose work is measured for it."""
    for setting, compressor in SETTINGS.items():
        yield setting, compressor, setting
        if network.hosts is not None and compressor is not None and setting in IN_TWO_LEVELS:
            yield f"{setting[:-1]}, hierarchical=True)", replace(compressor, hierarchical=True), setting


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _times(theirs: float, mine: float) -> str:
    return f"{theirs / mine:.2f}x" if mine else ""


NUMBER = r"\d+(?:\.\d*)?|\.\d+"


def bytes_per_second(link: str) -> float:
    """Of a rate such as 100mbit, 1gbit or 25Gbit.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(rf"({NUMBER})\s*([kmg])bit(?:/s|ps)?", link.strip().lower())
    if found is None or not float(found[1]):
        raise ValueError(f"{link!r} is no rate of a link: say 100mbit, 1gbit or 25gbit")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8


def seconds(duration: str) -> float:
    """Of a duration such as 50us, 0.1ms or 2s.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(rf"({NUMBER})\s*(us|ms|s)", duration.strip().lower())
    if found is None:
        raise ValueError(f"{duration!r} is no duration: say 50us, 0.1ms or 2s")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]
