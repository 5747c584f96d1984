"""What a compressor's generator keeps of a matrix, before the first step."""

import numpy as np
import tensorflow as tf

from horovod_powersgd.compressors.collectives import AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.matrix_state import MatrixState
from horovod_powersgd.tensorflow import arrays


class _Watched(MatrixState):
    """Remembers what is asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.initial: dict[str, np.ndarray] = {}

    def get(self, key, initial):
        self.initial[key] = np.asarray(initial)
        return super().get(key, initial)


def initial_values(
    compressor: Compressor, name: str, shape: tuple[int, int], amount: int, dtype: tf.DType
) -> dict[str, np.ndarray]:
    """What is kept of a matrix before the first step, by key: the generator is run once, in a graph that nobody needs.

    Args:
        compressor: no Accordion.
        name: of the tensor.
        shape: of the matrix.
        amount: Compressor.amount of it.
        dtype: of its gradient.
    """
    with tf.__internal__.FuncGraph("kept").as_default():
        zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
        state = _Watched(arrays, name, shape, zero, {}, tf.constant)
        state.begin(zero, amount, zero, one, tf.constant(True))
        generator, answer = compressor.exchange(tf.zeros(shape, dtype), state), None
        try:
            while True:
                request = generator.send(answer)
                answer = request.tensors
                if isinstance(request, QuantizedMean):
                    answer = [answer, answer]
                elif not isinstance(request, AllreduceMean):
                    answer = [part[None] for part in answer]
        except StopIteration:
            pass
        for key in state.kept.keys() - state.initial.keys():
            value = state.kept[key]
            state.initial[key] = np.zeros(value.shape, value.dtype.as_numpy_dtype)
    return state.initial
