"""horovod_powersgd.calibration for TensorFlow, by ops that run at once."""

from collections.abc import Sequence

import tensorflow as tf
from horovod.tensorflow.mpi_ops import Max, ProcessSet, Sum
from tensorflow.python.eager import context

from horovod_powersgd import calibration
from horovod_powersgd.calibration import seconds_of
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.cost import samples_of
from horovod_powersgd.tensorflow.exchange import Exchange
from horovod_powersgd.tensorflow.fast_paths import gradient_class_of
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.step_counters import StepCounters
from horovod_powersgd.tensorflow.variable_state import VariableState
from horovod_powersgd.tensorflow.workers import Workers

# Steps of these matrices tell what passes take: cost.SAMPLES, of fewer matrices, since each makes the graph larger.
SAMPLES = [[(48, 48)] * 8, [(1024, 2048)], [(16384, 48)]]


class Calibration(calibration.Calibration):
    """Measures what messages take. Its methods run inside a step.

    Args:
        workers: that measure.
    """

    def __init__(self, workers: Workers):
        self._workers, self.count = workers, int(workers.count(tf.int64))

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all workers', number by number. A worker that has joined (hvd.join) counts as zeros."""
        return self._workers.allreduce(tf.constant(numbers, tf.int64), "calibration.seconds", Max).numpy().tolist()

    def _average(self, dtype: str, nbytes: int) -> None:
        zeros = tf.zeros(nbytes // tf.as_dtype(dtype).size, dtype)
        self._workers.allreduce(zeros, f"calibration.{dtype}", Sum).numpy()

    def _gather(self, share: int, nbytes: int) -> None:
        self._workers.allgather(tf.zeros(nbytes // share, tf.uint8), "calibration.gather").numpy()

    def _slowest(self, nanoseconds: int) -> int:
        return self.largest([nanoseconds])[0]


class _Alone(Workers):
    """One worker without others."""

    alone = True

    def count(self, dtype: tf.DType) -> tf.Tensor:
        return tf.constant(1, dtype)

    def number(self) -> tf.Tensor:
        return tf.constant(0, tf.int64)


def passes(compressor: Compressor, process_set: ProcessSet) -> list[float]:
    """Seconds that steps of samples_of(compressor, SAMPLES) take of this worker's processor, without messages. Not to
    be called inside a step, whose threads they may need."""
    # In a graph that is being built, too, of whichever TensorFlow.
    with context.eager_mode():
        return [_seconds_of_step(shapes, compressor, process_set) for shapes in samples_of(compressor, SAMPLES)]


def _seconds_of_step(shapes: Sequence[tuple[int, int]], compressor: Compressor, process_set: ProcessSet) -> float:
    counters, gradient_class = StepCounters(), gradient_class_of(compressor)
    states = [
        VariableState(str(i), shape, tf.float32, compressor, process_set, counters, gradient_class)
        for i, shape in enumerate(shapes)
    ]
    exchange = Exchange(Settings(compressor, process_set), states, None, (False,) * len(states), _Alone)
    gradients = [tf.random.normal(shape) for shape in shapes]

    def step() -> None:
        exchange(gradients)
        tf.test.experimental.sync_devices()

    return seconds_of(step)
