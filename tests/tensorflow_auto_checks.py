"""hvd.Auto in the workers of a job of TensorFlow: choices that are made for it, and its own."""

import contextlib
import sys
import tempfile
from unittest import mock

import numpy as np
import tensorflow as tf
from tensorflow import keras

import cases
import choices as choices_of_all
import horovod_powersgd.tensorflow as hvd
import horovod_powersgd.tensorflow.keras as hvd_keras
from choices import PLAIN, mean_gradients, short_tries
from horovod_powersgd import Auto, PowerSGD, TopK
from horovod_powersgd.choosing import Choice, Chooser
from horovod_powersgd.cost import Work
from horovod_powersgd.network import Curve, Network
from horovod_powersgd.tensorflow import auto_exchange, calibration
from horovod_powersgd.tensorflow.agreement import new_generation
from horovod_powersgd.tensorflow.auto_exchange import AutoExchange
from horovod_powersgd.tensorflow.quantization import quantized_mean
from horovod_powersgd.tensorflow.senders import Senders
from horovod_powersgd.tensorflow.training import known_states
from measured_plan import plan_is_measured
from tensorflow_trainee import EagerTrainee, FunctionTrainee

AUTO = Auto(PowerSGD(rank=2, min_compression_rate=1), hvd.Compression.fp16, TopK(0.1))
SHAPES = {name: cases.SHAPES[name] for name in ("linear", "tall", "square", "vector")}
SMALL, MIDDLE = (Choice(0, frozenset(names)) for names in (["square"], ["square", "tall"]))


@contextlib.contextmanager
def choosing(*choices):
    """choices.choosing, after each step. Nothing is measured."""
    with (
        choices_of_all.choosing(*choices),
        mock.patch.object(Chooser, "interval", 1),
        mock.patch.object(auto_exchange, "passes", lambda *_: []),
        mock.patch.object(auto_exchange, "NUMBERS", dict(zip(auto_exchange.NUMBERS, (32 * 32 + 1, 48 * 64)))),
    ):
        yield


def gradients(step, dtype="float64"):
    return cases.gradients(step, hvd.rank(), dtype, SHAPES)


def memories(trainee):
    """The mean of all workers' memories."""
    states = known_states(trainee.variables.values())
    found = {state.name: state.memory.numpy() for state in states if state.memory is not None}
    everyone = hvd.allgather_object(found, name="memories")
    return {name: np.mean([mine[name] for mine in everyone], axis=0) for name in found}


def check_no_gradient_is_lost_and_candidates_do_as_they_do_alone():
    script = [PLAIN, Choice(0), Choice(0), Choice(2), SMALL, MIDDLE, Choice(0), Choice(1), PLAIN]
    taken, given = {}, {}
    with choosing(*script):
        trainee = FunctionTrainee(AUTO, "float64", SHAPES)
        for step in range(2 + len(script)):
            # The first step begins the clock, so what is chosen after a step counts from the third on.
            chosen = script[step - 2] if step > 1 else PLAIN
            before, updates = memories(trainee), trainee.exchange(gradients(step))
            means = mean_gradients(step, hvd.size(), "float64", SHAPES)
            for name, mean in means.items():
                given[name], taken[name] = given.get(name, 0) + mean, taken.get(name, 0) + updates[name]
            after = memories(trainee)
            waits = set(before) if chosen.number in (None, 1) else chosen.plain
            for name in waits:
                np.testing.assert_array_equal(after[name], before[name])
            for name in SHAPES if chosen == PLAIN else [*chosen.plain, "vector"]:
                # Half precision takes vectors, too.
                assert cases.error(updates[name], means[name]) < (2**-10 if chosen.number == 1 else 1e-9), (step, name)
    # Half precision keeps nothing of what it rounds.
    for name, memory in after.items():
        assert cases.error(taken[name] + memory.reshape(taken[name].shape), given[name]) < 2**-11, name
    # From the third step on, as the candidate alone from its first.
    for number, candidate in enumerate(AUTO.candidates):
        with choosing(Choice(number)):
            ours, alone = EagerTrainee(AUTO, "float64", SHAPES), EagerTrainee(candidate, "float64", SHAPES)
            for step in range(5):
                found = ours.exchange(gradients(step))
                if step > 1:
                    cases.assert_close(found, alone.exchange(gradients(step)), 1e-9, (candidate, step))
        assert ours.stats().bytes_sent == alone.stats().bytes_sent


def checkpoint(trainee):
    return tf.train.Checkpoint(compression=hvd.CompressionState(trainee.variables.values(), AUTO))


def check_a_saved_choice_goes_on_and_statistics_say_what_it_was():
    with choosing(PLAIN, MIDDLE):
        whole = EagerTrainee(AUTO, "float64", SHAPES)
        for step in range(5):
            whole.exchange(gradients(step))
            if step == 0:
                assert {t.chosen for t in whole.stats().tensors} == {"none"}
                assert whole.stats().bytes_sent == whole.stats().bytes_uncompressed
    by_name = {tensor.name: tensor for tensor in whole.stats().tensors}
    assert by_name["tall"].chosen == "none" and "longer" in by_name["tall"].reason
    assert by_name["linear"].chosen == repr(AUTO.candidates[0]) and by_name["linear"].residual > 0
    saved = whole.saved()
    with choosing(), tempfile.TemporaryDirectory() as folder:
        resumed, restored = (EagerTrainee(AUTO, "float64", SHAPES) for _ in range(2))
        resumed.load(saved)
        path = checkpoint(whole).save(f"{folder}/worker-{hvd.rank()}")
        checkpoint(restored).restore(path).assert_consumed()
        alone = EagerTrainee(AUTO.candidates[0], "float64", SHAPES)
        alone.load(saved)  # as the candidate itself, which compresses all
        for step in range(5, 7):
            expected = whole.exchange(gradients(step))
            for other in (resumed, restored):
                cases.assert_close(other.exchange(gradients(step)), expected, 1e-9, step)
        # A worker that comes later takes what the others have chosen.
        if hvd.rank() == hvd.size() - 1:
            [counters] = {state.counters for state in known_states(resumed.variables.values())}
            counters.steps.assign(0)
            counters.chosen.begin_again()
        new_generation()
        for other in (whole, resumed):
            other.exchange(gradients(7))
            assert {t.name for t in other.stats().tensors if t.compressed} == {"linear"}
        assert alone.exchange(gradients(5)).keys() == expected.keys()
        assert alone.stats().bytes_sent < resumed.stats().bytes_sent < whole.stats().bytes_uncompressed


def check_what_a_choice_does_not_keep_is_saved_too():
    few = AUTO.candidates[:2]
    with choosing(PLAIN, Choice(0), Choice(1)):
        whole = EagerTrainee(Auto(*few), "float64", SHAPES)
        for step in range(5):
            whole.exchange(gradients(step))
    assert {tensor.chosen for tensor in whole.stats().tensors} == {repr(few[1])}
    [kept] = {state.memory.ref() for state in known_states([whole.variables["linear"]])}
    saved = whole.saved()
    np.testing.assert_array_equal(saved["tensors"]["linear"]["memory"], kept.deref().numpy())
    assert kept.deref().numpy().any()
    with choosing():
        resumed, alone = EagerTrainee(Auto(few[1], few[0]), "float64", SHAPES), EagerTrainee(few[0], "float64", SHAPES)
        for trainee in (resumed, alone):
            trainee.load(saved)
            state = known_states([trainee.variables["linear"]])[0]
            np.testing.assert_array_equal(state.memory.numpy(), kept.deref().numpy())
        cases.assert_close(resumed.exchange(gradients(5)), whole.exchange(gradients(5)), 1e-9, "resumed")
    assert {tensor.chosen for tensor in resumed.stats().tensors} == {repr(few[1])}
    without = EagerTrainee(Auto(few[0]), "float64", SHAPES)
    without.load(saved)  # what was chosen is none of its candidates
    with choosing():
        without.exchange(gradients(5))
    assert {tensor.chosen for tensor in without.stats().tensors} == {"none"}


def check_what_waits_for_another_candidate_is_saved_too():
    shapes, auto = {name: cases.SHAPES[name] for name in ("linear", "row")}, Auto(PowerSGD(rank=2), TopK(0.1))
    with choosing(PLAIN, Choice(1), Choice(1), Choice(0)):
        whole, resumed = (EagerTrainee(auto, "float64", shapes) for _ in range(2))
        for step in range(7):
            whole.exchange(cases.gradients(step, hvd.rank(), "float64", shapes))
    assert {t.name for t in whole.stats().tensors if t.compressed} == {"linear"}  # rank 2 does not compress the row
    saved = whole.saved()
    resumed.load(saved)
    for of_whole, of_resumed in zip(known_states(whole.variables.values()), known_states(resumed.variables.values())):
        kept = of_whole.memory.numpy()
        assert kept.any()
        np.testing.assert_array_equal(saved["tensors"][of_whole.name]["memory"], kept)
        np.testing.assert_array_equal(of_resumed.memory.numpy(), kept)


def check_all_workers_choose_alike_in_fit():
    few = Auto(*AUTO.candidates[:2])
    slow = Curve(((0, 1e-2), (1e6, 1.0)))

    def calibrate(self, calibration):
        return Network(hvd.size(), slow, slow, slow, slow), [Work(1e-5, 1e-10)] * len(few.candidates)

    # Measured and predicted on this machine, and as on a network that is slow.
    for slowly in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(100, "tanh"), keras.layers.Dense(50)])
        optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.01), compression=few)
        model.compile(optimizer=optimizer, loss="mse")
        chosen = []

        def note(batch, logs=None):
            tensors = optimizer.compression_stats().tensors
            chosen.append([(tensor.chosen, tensor.predicted_step, tensor.measured_step) for tensor in tensors])

        noting = keras.callbacks.LambdaCallback(on_train_batch_end=note)
        x = np.random.default_rng(hvd.rank()).standard_normal((8 * 25, 200)).astype("float32")
        y = np.zeros((8 * 25, 50), "float32")
        with contextlib.ExitStack() as patches:
            patches.enter_context(short_tries)
            warning = patches.enter_context(mock.patch.object(tf.get_logger(), "warning"))
            if slowly:
                patches.enter_context(mock.patch.object(AutoExchange, "_calibrate", calibrate))
                patches.enter_context(mock.patch.object(auto_exchange, "passes", lambda *_: []))
            model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[noting])
        assert not any("retracing" in str(call) for call in warning.mock_calls)
        assert len(chosen) == 25 and {what for what, *_ in chosen[0]} == {"none"}
        everyones = hvd.allgather_object(chosen, name="chosen")
        assert all(theirs == chosen for theirs in everyones)
        chooser = optimizer._aggregation.reduction.exchange._chooser
        assert PLAIN in chooser.measured and chosen[-1][0][1:] == (
            chooser.predicted[chooser.choice], chooser.measured.get(chooser.choice)
        )
        hvd.assert_replicas_equal(model.variables)
    assert len({what for (what, *_), *_ in chosen}) > 1  # on the slow one, something else was tried


def check_exchanges_with_variables_in_common_choose_together():
    halves, slow, looks = Auto(hvd.Compression.fp16), Curve(((0, 1e-2), (1e6, 1.0))), []

    def calibrate(self, calibration):
        looks.append(self)
        return Network(hvd.size(), slow, slow, slow, slow), [Work(1e-5, 1e-10)]

    few, more = ["linear", "tall"], ["linear", "square", "vector"]
    whole = EagerTrainee(halves, "float32", SHAPES)
    heads = [EagerTrainee(halves, "float32", {}) for _ in range(2)]
    for head, names in zip(heads, (few, more)):
        head.variables = {name: whole.variables[name] for name in names}
    with (
        short_tries,
        mock.patch.object(AutoExchange, "_calibrate", calibrate),
        mock.patch.object(auto_exchange, "passes", lambda *_: []),
        mock.patch.object(auto_exchange, "UNUSED", 100),
    ):
        for step in range(30):
            for head in heads:
                head.exchange(gradients(step, "float32"))
        [counters] = {state.counters for state in known_states(whole.variables.values())}
        first, decider = counters.exchanges.values()
        assert looks == [decider] and decider._chosen.decider is decider and len(decider.states) == 3
        chosen = [{t.name: t.chosen for t in head.stats().tensors} for head in heads]
        assert len({*chosen[0].values(), *chosen[1].values()}) == 1
        # The one that has chosen is used no more.
        for step in range(30, 200):
            heads[0].exchange(gradients(step, "float32"))
        assert decider._chosen.decider is first and set(looks[1:]) == {first}
    assert all(theirs == chosen for theirs in hvd.allgather_object(chosen, name="chosen"))


def check_an_optimizer_of_tensorflow_1_in_a_session():
    with choosing(Choice(0)), tf.Graph().as_default():
        weight = tf.compat.v1.get_variable("weight", initializer=np.zeros((48, 64), "float32"))
        given = tf.compat.v1.placeholder(tf.float32, (48, 64))
        optimizer = hvd.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(1.0), compression=AUTO)
        train = optimizer.apply_gradients(optimizer.compute_gradients(tf.reduce_sum(weight * given), [weight]))
        taken = []
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            for step in range(5):
                before = session.run(weight)
                session.run(train, {given: gradients(step, "float32")["linear"]})
                taken.append(before - session.run(weight))
    for step, update in enumerate(taken):
        assert np.linalg.matrix_rank(update, 1e-3) == (2 if step > 1 else 48), step


def check_factors_that_are_measured_are_as_independent_as_a_jobs():
    factor = np.random.default_rng(0).standard_normal(4 * 300).astype("float32")
    senders = Senders(calibration._Alone(hvd.global_process_set, "", workers=4))
    mean, own, _ = quantized_mean(tf.constant(factor), [(4, 300)], senders, "average")
    for found in (mean, own):
        np.testing.assert_allclose(found, factor, atol=abs(factor).max() / 100)


def check_plan_is_measured_without_pytorch():
    with mock.patch.dict(sys.modules, torch=None):
        plan_is_measured(hvd, "tensorflow")
