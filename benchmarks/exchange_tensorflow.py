"""A worker of exchange.py: exchanges a model's gradients by several methods, with a tape in a tf.function."""

import horovod.tensorflow as horovod
import tensorflow as tf

import horovod_powersgd.tensorflow as hvd
from methods import METHODS
from models import MODELS
from rounds import run_worker


def layout(shape):
    """TensorFlow's layout of a shape in PyTorch's: convolutions have their channels last."""
    if len(shape) != 4:
        return shape
    outputs, inputs, height, width = shape
    return height, width, inputs, outputs


@tf.custom_gradient
def arrival(loss, parameter, gradient):
    """Its gradient with respect to a parameter is a copy of a given one: as a real one, it is new in every step."""

    def backward(following):
        # The gradients come one after the other.
        with tf.control_dependencies([following]):
            copy = tf.raw_ops.DeepCopy(x=gradient)
        with tf.control_dependencies([copy]):
            return tf.identity(following), copy, None

    return tf.identity(loss), backward


class Exchange:
    """One method's step: the gradients of a tape."""

    def __init__(self, key, gradients):
        self._method = METHODS[key]
        self._gradients = gradients
        # Nobody looks at the values.
        self._parameters = [tf.Variable(gradient) for gradient in gradients]
        self._averages = tf.function(self._exchange)

    def step(self):
        self._averages()

    def pause(self):
        """There is nothing to give back: the gradients are gone with the step."""

    def bytes_sent(self):
        nbytes = sum(4 * gradient.shape.num_elements() for gradient in self._gradients)
        return self._method.bytes_sent(nbytes, lambda: hvd.compression_stats(self._parameters))

    def _exchange(self):
        with tf.GradientTape() as tape:
            loss = tf.zeros(())
            for parameter, gradient in zip(self._parameters, self._gradients):
                loss = arrival(loss, parameter, gradient)
        if self._method.library == "horovod":
            compression = getattr(horovod.Compression, self._method.compression)
            tape = horovod.DistributedGradientTape(tape, compression=compression)
        elif self._method.library == "ours":
            tape = hvd.DistributedGradientTape(tape, compression=self._method.config)
        return tape.gradient(loss, self._parameters)


def exchanges(model, methods):
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.random.set_seed(hvd.rank())
    gradients = [tf.random.normal(layout(shape)) for _, shape in MODELS[model]()]
    return {key: Exchange(key, gradients) for key in methods}


if __name__ == "__main__":
    run_worker(__doc__, exchanges, hvd)
