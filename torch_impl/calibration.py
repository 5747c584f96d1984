"""horovod_powersgd.calibration for PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from horovod.torch.mpi_ops import ProcessSet, Sum, allgather_async, allreduce_async_, synchronize

from horovod_powersgd import calibration
from horovod_powersgd.calibration import seconds_of
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.precision import is_horovods_fp16
from horovod_powersgd.cost import Work, samples_of
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.control_messages import largest
from horovod_powersgd.torch.engine import Engine
from horovod_powersgd.torch.workers import Workers

CPU = torch.device("cpu")


class _Alone(Workers):
    """One worker without others."""

    count, index = 1, 0


class Calibration(calibration.Calibration):
    """Measures what cost.predict needs.

    Args:
        process_set: of the workers that measure.
        prefix: of the names of their messages.
        device: that gradients are on.
    """

    def __init__(self, process_set: ProcessSet, prefix: str = "powersgd", device: torch.device = CPU):
        self.workers, self._device = Workers(process_set, f"{prefix}.calibration"), device
        self.count = self.workers.count

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that speaks for all."""
        return self.workers.index == 0

    def work(self, compressor: Compressor) -> Work:
        """What a compressor's steps take of this worker's processor, while the others' work as well."""
        if is_horovods_fp16(compressor):
            step_of = partial(_cast, self._device)
        else:
            step_of = partial(_step, compressor, self.workers.process_set, self._device)
        samples = samples_of(compressor)
        return Work.fitted([(shapes, seconds_of(step_of(shapes), self._slowest)) for shapes in samples])

    def works(self, settings: Mapping[str, Compressor | None]) -> dict[str, Work]:
        """Of each compressor, by the names that they are given with; None takes none."""
        return {name: self.work(compressor) for name, compressor in settings.items() if compressor is not None}

    def _average(self, dtype: str, nbytes: int) -> None:
        of_torch = getattr(torch, dtype)
        tensor = torch.zeros(nbytes // of_torch.itemsize, dtype=of_torch, device=self._device)
        name, process_set = f"{self.workers.prefix}.{dtype}", self.workers.process_set
        synchronize(allreduce_async_(tensor, name=name, op=Sum, process_set=process_set))

    def _gather(self, share: int, nbytes: int) -> None:
        part = torch.zeros(nbytes // share, dtype=torch.uint8, device=self._device)
        name, process_set = f"{self.workers.prefix}.gather", self.workers.process_set
        synchronize(allgather_async(part, name=name, process_set=process_set))

    def _slowest(self, nanoseconds: int) -> int:
        return largest(self.workers, [nanoseconds], "seconds")[0]


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
