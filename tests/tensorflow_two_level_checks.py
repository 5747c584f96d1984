"""An exchange in two levels, in TensorFlow."""

import tempfile

import numpy as np
import pytest
import tensorflow as tf

import cases
import horovod_powersgd.tensorflow as hvd
from horovod_powersgd import reference
from horovod_powersgd.layout import trailing_columns
from horovod_powersgd.tensorflow.agreement import new_generation
from horovod_powersgd.tensorflow.calibration import Calibration
from horovod_powersgd.tensorflow.training import known_states
from tensorflow_trainee import EagerTrainee, any_trainee, start_with
from two_levels import CONFIG, CONFIGS, IN_8_BITS, TwoLevels


def levels(trainee, *names):
    shapes = {name: cases.SHAPES[name] for name in names}
    return TwoLevels(hvd, lambda *run: trainee(*run, shapes=shapes), shapes, trailing_columns, new_generation)


of_any, of_tapes = levels(any_trainee, "linear", "row", "vector"), levels(EagerTrainee, "linear", "vector")


def check_two_levels_equal_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    # Of those that the other checks leave, half under Gloo and half under MPI; one where there is one level.
    some = CONFIGS[:1] if of_any.flat_because() else CONFIGS[2 + hvd.mpi_enabled() :: 2]
    of_any.equal_the_reference([(config, cases.DTYPES[i % 2]) for i, config in enumerate(some)])


def check_two_levels_in_8_bits_equal_the_reference():
    start_with(hvd.size() + hvd.mpi_enabled())
    # One keeps a memory in 16 bits, the other is Accordion.
    of_any.equal_the_reference_in_8_bits(IN_8_BITS[1 + hvd.mpi_enabled() :][:1])


def check_messages_of_two_levels_are_measured():
    of_tapes.messages_are_measured(Calibration(hvd.global_process_set, [(64, 64)]))


def check_a_state_goes_on_as_it_was():
    with tempfile.TemporaryDirectory() as folder:

        def checkpoint(trainee):
            kept = hvd.CompressionState(trainee.variables.values(), CONFIGS[1])
            return tf.train.Checkpoint(compression=kept)

        def save(trainee):
            return checkpoint(trainee).save(f"{folder}/worker-{hvd.rank()}")

        def load(trainee, path):
            checkpoint(trainee).restore(path).assert_consumed()

        ways = [(EagerTrainee.saved, EagerTrainee.load), (save, load)]
        of_tapes.a_state_goes_on_as_it_was(CONFIGS[1], ways)


def check_a_state_of_one_level_goes_on_in_two_and_back():
    of_tapes.a_state_of_one_level_goes_on_in_two_and_back(alone=False)


def discardable(trainee, gradients):
    """A new tape, which could discard the step, and the updates."""
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(v * gradients[name]) for name, v in trainee.variables.items())
    tape = hvd.DistributedGradientTape(tape, compression=trainee.config)
    tape.discardable = True
    return tape, tape.gradient(loss, list(trainee.variables.values()))


def check_what_memories_hold_stays_when_hosts_change():
    def exchange(trainee, gradients):
        # Usually nothing is cut off.
        for state in known_states([trainee.variables["linear"]]):
            state.usual_clipping.assign(1)
        tape, updates = discardable(trainee, gradients)
        # Of the memory before nothing can come back, since it is of other rows: all of the new one stays.
        tape.clip_by_global_norm(updates, 1e-3)
        return {name: update.numpy() for name, update in zip(trainee.variables, updates)}

    of_tapes.what_memories_hold_stays_when_hosts_change(exchange)


def check_a_step_that_is_not_taken_or_not_finite_leaves_no_trace():
    of_tapes.steps_that_are_not_finite_or_not_taken_leave_no_trace(lambda *step: discardable(*step)[0].discard())


def check_a_worker_that_joins_is_refused():
    trainee, hosts = of_tapes.trained
    with of_tapes.on_hosts():
        of_tapes.compare(trainee, hosts, CONFIG, "float64", 1)
        if hvd.rank() > 0:
            with pytest.raises(RuntimeError, match="hvd.join.*hierarchical"):
                trainee.exchange(of_tapes.mine(0))
        hvd.join()
        of_tapes.compare(trainee, hosts, CONFIG, "float64", 1)


def check_an_optimizer_of_tensorflow_1_exchanges_in_two_levels():
    v1, shape = tf.compat.v1, cases.SHAPES["linear"]
    # In all launches TensorFlow rewrites this graph: the hosts' variable gets another shape while it runs.
    with tf.Graph().as_default(), v1.Session(config=v1.ConfigProto()) as session, of_tapes.on_hosts():
        v = v1.get_variable("linear", shape, initializer=v1.zeros_initializer(), use_resource=True)
        gradient = v1.placeholder(tf.float32, shape)
        optimizer = hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(1.0), compression=CONFIG)
        train = optimizer.minimize(tf.reduce_sum(v * gradient))
        session.run(v1.global_variables_initializer())
        hosts, before = [reference.State(), reference.State()], np.zeros(shape)
        for step in range(4):
            everyone = [{"linear": theirs["linear"]} for theirs in of_tapes.gradients(step, "float32")]
            update = of_tapes.simulate(everyone, hosts, CONFIG)["linear"]
            session.run(train, {gradient: everyone[hvd.rank()]["linear"]})
            after = session.run(v)
            np.testing.assert_allclose(before - after, update, rtol=1e-3, atol=1e-4)
            before = after
