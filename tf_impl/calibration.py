"""horovod_powersgd.calibration for TensorFlow, by ops that run at once."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median_low

import tensorflow as tf
from horovod.tensorflow.mpi_ops import Average, Max, ProcessSet
from tensorflow.python.eager import context

from horovod_powersgd import calibration
from horovod_powersgd.calibration import BLOCK, average_of, take_turns, times_of
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.cost import samples_of
from horovod_powersgd.layout import trailing_columns
from horovod_powersgd.tensorflow.exchange import Exchange
from horovod_powersgd.tensorflow.fast_paths import gradient_class_of
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.step_counters import StepCounters
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Workers

# Passes are repeated for so many seconds, while a graph is built.
TURNS_SECONDS = 0.1


class Calibration(calibration.Calibration):
    """Measures what cost.predict needs. Inside a step, where the threads are busy that another step may need, only
    messages can be measured: `passes` does the rest before.

    Args:
        process_set: of the workers that measure.
        shapes: of the model's tensors.
        matrix_shape: as layout_of's.
        prefix: of the names of their messages.
        device: of Horovod's ops; "" is TensorFlow's choice.
    """

    # Each matrix makes a graph larger.
    most = 6

    def __init__(
        self,
        process_set: ProcessSet,
        shapes: Sequence[tuple[int, ...]],
        matrix_shape: Callable = trailing_columns,
        prefix: str = "powersgd",
        device: str = "",
    ):
        self._workers = Workers(process_set, f"{prefix}.calibration", device=device)
        self.count, self.index = int(self._workers.count(tf.int64)), int(self._workers.number())
        self.shapes, self.matrix_shape = shapes, matrix_shape
        # By dtype.
        self._kept: dict[str, tf.Tensor] = {}
        self.on_processor = not tf.config.get_visible_devices("GPU")
        self._thread = ThreadPoolExecutor(1)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        return self._workers.allreduce(tf.constant(numbers, tf.int64), "numbers", Max).numpy().tolist()

    def _step(
        self, compressor: Compressor, shapes: Sequence[tuple[int, int]], workers: int
    ) -> Callable[[], None]:
        return _step(compressor, self._workers.process_set, shapes, workers)

    def _begin_average(self, dtype: str, nbytes: int, parts: int) -> Callable[[], object]:
        def average() -> None:
            with context.eager_mode():  # which a thread has for itself
                whole = self._message(dtype, nbytes)
                size = len(whole) // parts
                message = whole[: size * parts]
                if parts == 1:
                    self._workers.allreduce(message, dtype, Average).numpy()
                else:
                    tensors = tf.split(tf.reshape(message, (parts, size)), parts)
                    self._workers.sums(tensors, f"{dtype}.parts")[-1].numpy()

        return self._thread.submit(average).result

    def _gather(self, share: int, nbytes: int) -> None:
        self._workers.allgather(self._message("float32", max(4, nbytes // share)), "gather").numpy()

    def _exchange(self, whom: Sequence[int], nbytes: int, adds: bool = True) -> None:
        count = len(whom)
        size = max(1, nbytes // 4 // count)
        peers, to_each = tf.constant(whom, tf.int64), tf.constant([size] * count, tf.int64)
        received = self._workers.exchange(self._message("float32", 4 * size * count), peers, to_each, "alltoall")
        (tf.reduce_sum(tf.reshape(received, (count, size)), 0) if adds else received).numpy()

    def _renew(self, dtype: str, nbytes: int) -> bool:
        before = self._kept.get(dtype)
        self._message(dtype, nbytes)
        return self._kept[dtype] is not before

    def _message(self, dtype: str, nbytes: int) -> tf.Tensor:
        count = nbytes // tf.as_dtype(dtype).size
        if dtype not in self._kept or len(self._kept[dtype]) < count:
            self._kept[dtype] = tf.tile(tf.cast(self._numbers, dtype), [-(-count // BLOCK)])
        return self._kept[dtype][:count]  # which copies nothing

    @functools.cached_property
    def _numbers(self) -> tf.Tensor:
        return _random((BLOCK,), self.index)


@dataclass(frozen=True)
class _Alone(Workers):
    """One worker, who stands for others: they would send what it sends.

    Attributes:
        workers: how many they are together.
        slices: by the name of an average, those of it that this worker has sent.
    """

    workers: int = 1
    slices: dict[str, tf.Tensor] = field(default_factory=dict, compare=False)
    alone = True

    @property
    def size(self) -> int:
        return self.workers

    def count(self, dtype: tf.DType) -> tf.Tensor:
        return tf.constant(self.workers, dtype)

    def number(self) -> tf.Tensor:
        return tf.constant(0, tf.int64)

    def gather(self, packed: tf.Tensor, name: str) -> tf.Tensor:
        slices = self.slices.pop(average_of(name), None)
        return tf.tile(packed[None], [self.workers, 1]) if slices is None else slices

    def alltoall(self, messages: tf.Tensor, name: str) -> tf.Tensor:
        self.slices[average_of(name)] = messages
        return tf.tile(messages[:1], [self.workers, 1])

    def exchange(self, tensor: tf.Tensor, peers: tf.Tensor, sizes: tf.Tensor, name: str) -> tf.Tensor:
        return tensor


def passes(
    compressor: Compressor, process_set: ProcessSet, shapes: Sequence[tuple[int, ...]]
) -> list[tuple[list[tuple[int, int]], float]]:
    """(shapes, seconds) of steps that tell what a compressor takes of this worker's processor, without messages. Not to
    be called inside a step, whose threads they may need.

    Args:
        compressor: the configuration.
        process_set: of the workers that there are.
        shapes: of the variables.
    """
    samples = samples_of(compressor, shapes, trailing_columns, Calibration.most)
    # In a graph that is being built, too, of whichever TensorFlow.
    with context.eager_mode():
        steps = [_step(compressor, process_set, some, process_set.size()) for some in samples]
        turns = [take_turns(steps)]
        times_of(lambda: turns.append(take_turns(steps)), TURNS_SECONDS)
        return [(some, median_low(times) / 1e9) for some, *times in zip(samples, *turns, strict=True)]


def _step(
    compressor: Compressor, process_set: ProcessSet, shapes: Sequence[tuple[int, int]], workers: int
) -> Callable[[], None]:
    """A step of these matrices without messages."""
    who = functools.partial(_Alone, workers=workers)
    counters, gradient_class = StepCounters(), gradient_class_of(compressor)
    states = [
        VariableState(str(i), shape, tf.float32, compressor, process_set, counters, gradient_class)
        for i, shape in enumerate(shapes)
    ]
    exchange = Exchange(Settings(compressor, process_set), states, None, (False,) * len(states), who)
    gradients = [_random(shape) for shape in shapes]

    def run() -> None:
        exchange(gradients)
        tf.test.experimental.sync_devices()

    run()  # the first one takes much longer
    return run


def _random(shape: tuple[int, ...], worker: int = 0) -> tf.Tensor:
    """A worker's numbers, that leave TensorFlow's own generators as they are, from which the job draws."""
    return tf.random.stateless_normal(shape, seed=(worker, 0))
