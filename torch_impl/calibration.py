"""horovod_powersgd.calibration for PyTorch."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from horovod.torch.mpi_ops import ProcessSet, allgather_async, allreduce_async_, local_rank, synchronize

from horovod_powersgd import calibration
from horovod_powersgd.buckets import BUCKET_BYTES, GPU_BUCKET_BYTES
from horovod_powersgd.calibration import BLOCK, SIZES, average_of
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.compressors.precision import is_horovods_fp16
from horovod_powersgd.hosts import Host
from horovod_powersgd.layout import leading_rows
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.control_messages import largest
from horovod_powersgd.torch.engine import Engine
from horovod_powersgd.torch.futures import Gathered, Mean
from horovod_powersgd.torch.peers import peers_of
from horovod_powersgd.torch.workers import Workers


@dataclass
class _Alone(Workers):
    """One worker, who stands for others: they would send what it sends.

    Attributes:
        slices: by the name of an average, those of it that this worker has sent.
    """

    slices: dict[str, torch.Tensor] = field(default_factory=dict)
    count, index = 1, 0

    def mean(self, tensor: torch.Tensor, name: str, in_place: bool = False) -> Mean:
        return Mean(tensor)

    def gather(self, packed: torch.Tensor, name: str, parity: bool, compressor: Compressor) -> Gathered:
        slices = self.slices.pop(average_of(name), None)
        return Gathered(packed.repeat(self.count) if slices is None else slices.clone(), self.count, compressor)

    def exchange(
        self,
        messages: torch.Tensor,
        name: str,
        parity: bool,
        compressor: Compressor,
        sizes: Mapping[int, int] | None = None,
    ) -> Gathered:
        self.slices[average_of(name)] = messages
        return Gathered(messages[self.index].repeat(self.count), self.count, compressor)


class Calibration(calibration.Calibration):
    """Measures what cost.predict needs.

    Args:
        process_set: of the workers that measure.
        shapes: of the model's tensors.
        matrix_shape: as layout_of's.
        prefix: of the names of their messages.
        device: that gradients are on. None: a worker's own GPU, or that which it shares, and without one the processor.
    """

    def __init__(
        self,
        process_set: ProcessSet,
        shapes: Sequence[tuple[int, ...]],
        matrix_shape: Callable = leading_rows,
        prefix: str = "powersgd",
        device: torch.device | None = None,
    ):
        device = device or _usual_device()
        self._workers, self._device = Workers(process_set, f"{prefix}.calibration"), device
        self.count, self.index = self._workers.count, self._workers.index
        self.shapes, self.matrix_shape, self.on_processor = shapes, matrix_shape, device.type == "cpu"
        if self.on_processor:
            self.clock = time.thread_time_ns
        self.bucket_bytes = BUCKET_BYTES if self.on_processor else GPU_BUCKET_BYTES
        # By dtype.
        self._messages: dict[str, torch.Tensor] = {}

    def largest(self, numbers: Sequence[int]) -> list[int]:
        return largest(self._workers, list(numbers), "numbers")

    def _step(
        self, compressor: Compressor, shapes: Sequence[tuple[int, int]], workers: int
    ) -> Callable[[], None]:
        gradients = [self._message("float32", 4 * n * m).view(n, m).clone() for n, m in shapes]
        if is_horovods_fp16(compressor):
            return _cast(gradients)
        return _step(compressor, self._workers.process_set, gradients, workers)

    def _begin_average(self, dtype: str, nbytes: int, parts: int) -> Callable[[], object]:
        name, how = f"{self._workers.prefix}.{dtype}", self._workers.averaging(getattr(torch, dtype))
        message = self._message(dtype, nbytes).tensor_split(parts)
        handles = [allreduce_async_(part, name=f"{name}.{i}", **how) for i, part in enumerate(message)]
        return lambda: [synchronize(handle) for handle in handles]

    def _gather(self, share: int, nbytes: int) -> None:
        part = self._message("float32", max(4, nbytes // share))
        name, process_set = f"{self._workers.prefix}.gather", self._workers.process_set
        synchronize(allgather_async(part, name=name, process_set=process_set))

    def _renew(self, dtype: str, nbytes: int) -> bool:
        before = self._messages.get(dtype)
        message = self._message(dtype, nbytes)
        if dtype == "float16":
            for part in message.split(BLOCK):
                part.copy_(self._numbers[: len(part)])
        elif self._messages[dtype] is before:
            return False
        _finish(self._device)
        return True

    def _message(self, dtype: str, nbytes: int) -> torch.Tensor:
        as_dtype = getattr(torch, dtype)
        count = nbytes // as_dtype.itemsize
        if dtype not in self._messages or len(self._messages[dtype]) < count:
            self._messages[dtype] = self._numbers.to(as_dtype).repeat(-(-count // BLOCK))
        return self._messages[dtype][:count]

    @cached_property
    def _numbers(self) -> torch.Tensor:
        # PyTorch's own generators, from which the job draws, stay as they are.
        generator = torch.Generator(self._device).manual_seed(self.index)
        return torch.randn(BLOCK, device=self._device, generator=generator)

    def _means_of(self, host: Host) -> Callable[[int], None]:
        peers = peers_of(self._workers, host, ["gradient"], self.on_processor)
        if peers is None:
            return super()._means_of(host)
        gradient = torch.zeros(SIZES[-1] // 4)
        peers.show("gradient", gradient)
        self.largest([0])  # all have shown theirs
        shown = peers.shown()

        def average(nbytes: int) -> None:
            own = gradient[: nbytes // 4 // host.share.parts]
            peers.add_others("gradient", shown, own)
            own /= host.share.parts

        return average

    def _exchange(self, whom: Sequence[int], nbytes: int, adds: bool = True) -> None:
        size = max(1, nbytes // 4 // len(whom))
        message, to = self._message("float32", 4 * size * len(whom)), dict.fromkeys(whom, size)
        received = self._workers.exchange(message, "alltoall", False, PowerSGD(), to).result()
        if adds:
            received.sum(0)


def _usual_device() -> torch.device:
    count = torch.cuda.device_count()
    return torch.device("cuda", local_rank() % count) if count else torch.device("cpu")


def _cast(gradients: Sequence[torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        for gradient in gradients:
            gradient.copy_(gradient.half().to(gradient.dtype))
        _finish(gradients[0].device)

    return run


def _step(
    compressor: Compressor, process_set: ProcessSet, gradients: list[torch.Tensor], workers: int
) -> Callable[[], None]:
    """A step of these gradients without messages. As in a training, nobody but the parameters holds them: the last
    step's updates."""
    alone, device = _Alone(process_set), gradients[0].device
    engine = Engine(compressor, alone)
    agreement.leave(engine)
    for i in range(len(gradients)):
        parameter = torch.nn.Parameter(gradients[0].new_empty(()).expand_as(gradients[0]))  # which nobody looks at
        parameter.grad = gradients.pop(0)
        engine.add(str(i), parameter)

    def run() -> None:
        engine.finish(undoable=False)
        engine.commit()
        _finish(device)

    run()  # in its first step it agrees with others, and so has none
    alone.count = workers
    run()  # on a GPU, the first one that reads memories compiles a kernel
    return run


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
