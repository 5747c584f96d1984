"""What messages and passes take here: what horovod_powersgd.cost predicts from.

All workers measure at the same time, as they exchange at the same time; what counts is the slowest of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from horovod.torch.mpi_ops import ProcessSet, Sum, allgather_async, allreduce_async_, synchronize

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.precision import is_horovods_fp16
from horovod_powersgd.cost import LONG_MESSAGE, SAMPLES, SIZES, Curve, Network, Work
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.control_messages import largest
from horovod_powersgd.torch.engine import Engine
from horovod_powersgd.torch.workers import Workers

CPU = torch.device("cpu")


class _Alone(Workers):
    """One worker without others."""

    count, index = 1, 0


class Calibration:
    """Measures what cost.predict needs.

    Args:
        process_set: of the workers that measure.
        prefix: of the names of their messages.
        device: that gradients are on.
    """

    def __init__(self, process_set: ProcessSet, prefix: str = "powersgd", device: torch.device = CPU):
        self.workers, self._device = Workers(process_set, f"{prefix}.calibration"), device

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that speaks for all."""
        return self.workers.index == 0

    def network(self, gathers: bool = True) -> Network:
        """What messages of these workers take; of an allgather, only where it is asked for."""
        mean, halves = (self._curve(partial(self._start_mean, dtype)) for dtype in (torch.float32, torch.float16))
        count = self.workers.count
        gather = self._curve(partial(self._start_gather, count), count) if gathers else mean
        return Network(count, mean, halves, gather)

    def work(self, compressor: Compressor) -> Work:
        """What a compressor's steps take of this worker's processor, while the others' work as well."""
        if is_horovods_fp16(compressor):
            step_of = partial(_cast, self._device)
        else:
            step_of = partial(_step, compressor, self.workers.process_set, self._device)
        return Work.fitted([(shapes, self._seconds(step_of(shapes))) for shapes in SAMPLES])

    def works(self, settings: Mapping[str, Compressor | None]) -> dict[str, Work]:
        """Of each compressor, by the names that they are given with; None takes none."""
        return {name: self.work(compressor) for name, compressor in settings.items() if compressor is not None}

    def _start_mean(self, dtype: torch.dtype, nbytes: int) -> int:
        tensor = torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=self._device)
        name = f"{self.workers.prefix}.{dtype}"
        return allreduce_async_(tensor, name=name, op=Sum, process_set=self.workers.process_set)

    def _start_gather(self, share: int, nbytes: int) -> int:
        part = torch.zeros(nbytes // share, dtype=torch.uint8, device=self._device)
        return allgather_async(part, name=f"{self.workers.prefix}.gather", process_set=self.workers.process_set)

    def _curve(self, start: Callable[[int], int], share: int = 1) -> Curve:
        points: list[tuple[float, float]] = []
        for nbytes in SIZES:
            points.append((nbytes / share, self._seconds(partial(_wait_for, start, nbytes))))
            if points[-1][1] > LONG_MESSAGE:
                break
        return Curve(tuple(points))

    def _seconds(self, run: Callable[[], object]) -> float:
        """What it takes the slowest worker: the median of some times."""
        run()
        found: list[float] = []
        while len(found) < 2 or (sum(found) < 0.03 and len(found) < 15):
            begin = time.perf_counter()
            run()
            nanoseconds = int(1e9 * (time.perf_counter() - begin))
            # All workers go on from here together, and know how long the slowest has taken.
            found.append(largest(self.workers, [nanoseconds], "seconds")[0] / 1e9)
        return statistics.median(found)


def _wait_for(start: Callable[[int], int], nbytes: int) -> None:
    synchronize(start(nbytes))


def _cast(device: torch.device, shapes: Sequence[tuple[int, int]]) -> Callable[[], None]:
    gradients = [torch.randn(shape, device=device) for shape in shapes]

    def run() -> None:
        for gradient in gradients:
            gradient.copy_(gradient.half().to(gradient.dtype))
        _finish(device)

    return run


def _step(
    compressor: Compressor, process_set: ProcessSet, device: torch.device, shapes: Sequence[tuple[int, int]]
) -> Callable[[], None]:
    """A step of these matrices without messages."""
    engine = Engine(compressor, _Alone(process_set))
    agreement.leave(engine)
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for i, parameter in enumerate(parameters):
        engine.add(str(i), parameter)
    gradients = [torch.randn(shape, device=device) for shape in shapes]

    def run() -> None:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        engine.finish(undoable=False)
        engine.commit()
        _finish(device)

    return run


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
