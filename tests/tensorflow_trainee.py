"""Variables whose gradients are given, and what exchanges them: a tape or a Keras optimizer."""

import itertools
import os

import numpy as np
import tensorflow as tf
from tensorflow import keras

import cases
import horovod_powersgd.tensorflow as hvd
from horovod_powersgd import reference
from horovod_powersgd.tensorflow.training import known_states

# Of the time that a function takes until its first call is done, TensorFlow's rewriting of the graph takes a third.
# Some launches go without it.
if os.environ.get("GRAPHS") == "as-built":
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
# These launches also leave out what reads a function's Python for its ifs and loops: there are none below.
AUTOGRAPH = os.environ.get("GRAPHS") != "as-built"


class Trainee:
    """Variables whose gradients are given. Subclasses say how they are exchanged."""

    def __init__(self, config, dtype="float32", shapes=cases.SHAPES, **options):
        self.variables = {name: tf.Variable(np.zeros(shape, dtype), name=name) for name, shape in shapes.items()}
        self.config, self._options = config, options
        self._rate = tf.Variable(1.0)

    def set_rate(self, rate):
        """The learning rate of the steps that come."""
        self._rate.assign(rate)

    def start(self, gradients):
        """Takes the gradients of a step."""
        self._gradients = gradients

    def finish(self):
        """The updates of these gradients; they are also applied."""
        gradients = [tf.constant(self._gradients[name]) for name in self.variables]
        return {name: update.numpy() for name, update in zip(self.variables, self._update(gradients))}

    def exchange(self, gradients):
        """Start and finish."""
        self.start(gradients)
        return self.finish()

    def saved(self):
        """This worker's compression state."""
        return hvd.compression_state_dict(self.variables.values())

    def load(self, states):
        """Goes on where a state, or all workers' states, were saved."""
        hvd.load_compression_state_dict(states, self.variables.values(), compression=self.config)

    def stats(self):
        return hvd.compression_stats(self.variables.values())

    def state(self):
        """This worker's state as the reference keeps it."""
        state = reference.State()
        for kept in known_states(self.variables.values()):
            state.steps = int(kept.counters.steps)
            if state.steps <= kept.config.warmup_steps or np.isnan(0 if kept.norm is None else kept.norm):
                continue
            if kept.memory is not None:
                state.memory[kept.name] = kept.remembered().numpy()
            if kept.factor is not None:
                state.factors[kept.name] = reference.Factor(kept.factor.numpy().T, bool(kept.factor_is_q))
        return state


class EagerTrainee(Trainee):
    """Makes a tape in each step."""

    def _update(self, gradients):
        variables = list(self.variables.values())
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(v * gradient) for v, gradient in zip(variables, gradients))
        tape = hvd.DistributedGradientTape(tape, compression=self.config, **self._options)
        tape.learning_rate = self._rate
        updates = tape.gradient(loss, variables)
        for variable, update in zip(variables, updates):
            variable.assign_sub(update)
        return updates


class FunctionTrainee(EagerTrainee):
    """Makes its tape in a tf.function."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._update = tf.function(super()._update, autograph=AUTOGRAPH)


class KerasTrainee(Trainee):
    """Has a Keras optimizer, of whichever Keras this is, that subtracts the updates."""

    def __init__(self, *arguments, **options):
        import horovod_powersgd.tensorflow.keras as hvd_keras

        super().__init__(*arguments, **options)
        self.optimizer = hvd_keras.DistributedOptimizer(
            keras.optimizers.SGD(1.0), compression=self.config, **self._options
        )
        self._apply = tf.function(
            lambda gradients: self.optimizer.apply_gradients(list(zip(gradients, self.variables.values()))),
            autograph=AUTOGRAPH,
        )

    def set_rate(self, rate):
        super().set_rate(rate)
        self.optimizer.learning_rate = rate

    def _update(self, gradients):
        before = [variable.numpy() for variable in self.variables.values()]
        for variable in self.variables.values():
            variable.assign(tf.zeros_like(variable))
        self._apply(gradients)
        # The rates are powers of two.
        rate = self._rate.numpy()
        updates = [-tf.identity(variable) / rate for variable in self.variables.values()]
        for variable, value in zip(self.variables.values(), before):
            variable.assign_add(value)
        return updates


KINDS = [EagerTrainee, FunctionTrainee, KerasTrainee]
_turns = itertools.count()


def any_trainee(*arguments, **options):
    """Each in turn: over all the launches, each configuration meets each of them."""
    return KINDS[next(_turns) % len(KINDS)](*arguments, **options)


def start_with(number):
    """Which kind is next, whatever was made before."""
    global _turns
    _turns = itertools.count(number)
