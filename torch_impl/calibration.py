"""horovod_powersgd.calibration for PyTorch."""

from collections.abc import Callable, Mapping, Sequence

import torch
from horovod.torch.mpi_ops import ProcessSet, Sum, allgather_async, allreduce_async_, synchronize

from horovod_powersgd import calibration
from horovod_powersgd.calibration import OF_PARTS, PARTS, SIZES
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

CPU = torch.device("cpu")


class _Alone(Workers):
    """One worker, who stands for others: they would send what it sends."""

    count, index = 1, 0

    def mean(self, tensor: torch.Tensor, name: str, in_place: bool = False) -> Mean:
        return Mean(tensor)

    def gather(self, packed: torch.Tensor, name: str, parity: bool, compressor: Compressor) -> Gathered:
        return Gathered(packed.repeat(self.count), self.count, compressor)

    def exchange(
        self,
        messages: torch.Tensor,
        name: str,
        parity: bool,
        compressor: Compressor,
        sizes: Mapping[int, int] | None = None,
    ) -> Gathered:
        return Gathered(messages.clone(), self.count, compressor)


class Calibration(calibration.Calibration):
    """Measures what cost.predict needs.

    Args:
        process_set: of the workers that measure.
        shapes: of the model's tensors.
        matrix_shape: as layout_of's.
        prefix: of the names of their messages.
        device: that gradients are on.
    """

    def __init__(
        self,
        process_set: ProcessSet,
        shapes: Sequence[tuple[int, ...]],
        matrix_shape: Callable = leading_rows,
        prefix: str = "powersgd",
        device: torch.device = CPU,
    ):
        self._workers, self._device = Workers(process_set, f"{prefix}.calibration"), device
        self.count, self.index = self._workers.count, self._workers.index
        self.shapes, self.matrix_shape, self.on_processor = shapes, matrix_shape, device.type == "cpu"
        self._kept_zeros = torch.zeros(0, dtype=torch.uint8)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        return largest(self._workers, list(numbers), "numbers")

    def _step(
        self, compressor: Compressor, shapes: Sequence[tuple[int, int]], workers: int
    ) -> Callable[[], None]:
        if is_horovods_fp16(compressor):
            return _cast(self._device, shapes)
        return _step(compressor, self._workers.process_set, self._device, shapes, workers)

    def _begin_average(self, dtype: str, nbytes: int) -> Callable[[], object]:
        parts = self._zeros(nbytes).view(getattr(torch, dtype)).chunk(PARTS if nbytes >= OF_PARTS else 1)
        name, process_set = f"{self._workers.prefix}.{dtype}", self._workers.process_set
        handles = [
            allreduce_async_(part, name=f"{name}.{i}", op=Sum, process_set=process_set) for i, part in enumerate(parts)
        ]
        return lambda: [synchronize(handle) for handle in handles]

    def _gather(self, share: int, nbytes: int) -> None:
        part = self._zeros(nbytes // share)
        name, process_set = f"{self._workers.prefix}.gather", self._workers.process_set
        synchronize(allgather_async(part, name=name, process_set=process_set))

    def _zeros(self, nbytes: int) -> torch.Tensor:
        """So many bytes, which are there before they are sent, as gradients are."""
        if len(self._kept_zeros) < nbytes:
            self._kept_zeros = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        return self._kept_zeros[:nbytes]

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

    def _exchange(self, whom: Sequence[int], nbytes: int) -> None:
        size = nbytes // 4 // len(whom)
        message, to = self._zeros(4 * size * len(whom)).view(torch.float32), dict.fromkeys(whom, size)
        self._workers.exchange(message, "alltoall", False, PowerSGD(), to).result().sum(0)


def _cast(device: torch.device, shapes: Sequence[tuple[int, int]]) -> Callable[[], None]:
    gradients = [torch.randn(shape, device=device) for shape in shapes]

    def run() -> None:
        for gradient in gradients:
            gradient.copy_(gradient.half().to(gradient.dtype))
        _finish(device)

    return run


def _step(
    compressor: Compressor,
    process_set: ProcessSet,
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    workers: int,
) -> Callable[[], None]:
    """A step of these matrices without messages."""
    alone = _Alone(process_set)
    engine = Engine(compressor, alone)
    agreement.leave(engine)
    for i, shape in enumerate(shapes):
        parameter = torch.nn.Parameter(torch.empty(shape, device=device))
        parameter.grad = torch.randn(shape, device=device)
        engine.add(str(i), parameter)

    def run() -> None:
        # As in a training, nobody but the parameters holds the gradients: the last step's updates.
        engine.finish(undoable=False)
        engine.commit()
        _finish(device)

    run()  # in its first step it agrees with others, and so has none
    alone.count = workers
    return run


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
