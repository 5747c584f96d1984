"""Callbacks, replicas and states of elastic jobs under model.fit, in every worker of a job of several.

TF_USE_LEGACY_KERAS=1 selects Keras 2 (tf_keras); otherwise it is Keras 3.
"""

import contextlib
import copy
import importlib.util
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras
from tensorflow.core.util.event_pb2 import Event

import horovod_powersgd.tensorflow as hvd
import horovod_powersgd.tensorflow.keras.callbacks as callbacks
import horovod_powersgd.tensorflow.keras.elastic as elastic
from horovod_powersgd.statistics import CompressionStats, TensorStats
from horovod_powersgd.tensorflow import replicas
from horovod_powersgd.tensorflow.elastic import TensorFlowState, _recoverable

LEGACY = not hasattr(keras, "Variable")
SGD = keras.optimizers.SGD
LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer


class Recorder(keras.callbacks.Callback):
    """What the callbacks that stand where it does see."""

    def __init__(self):
        super().__init__()
        self.rates, self.logs, self.weights = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(number(self.model.optimizer.learning_rate))
        self.weights.append([np.array(w) for w in self.model.get_weights()])

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


class Edit(keras.callbacks.Callback):
    """Calls a function with each epoch's logs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_epoch_end(self, epoch, logs=None):
        self.function(logs)


def number(variable):
    return float(np.asarray(variable))


def network(optimizer, seed=0, dtype="float32"):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3, dtype=dtype)])
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def data(rows=24):
    """A worker's own."""
    numbers = np.random.default_rng(hvd.rank()).standard_normal((rows, 9)).astype("float32")
    return numbers[:, :6], numbers[:, 6:]


def fit(model, used, epochs=1, **options):
    return model.fit(*data(), batch_size=8, epochs=epochs, callbacks=used, verbose=0, **options)


def optimizers():
    made = [keras.optimizers.Adam(0.01), SGD(0.1, momentum=0.9), LossScaleOptimizer(SGD(0.1, momentum=0.9))]
    if LEGACY:
        legacy = keras.optimizers.legacy
        made += [legacy.SGD(0.1, momentum=0.9), LossScaleOptimizer(legacy.Adam(0.01))]
    return made


def everything(model):
    """That workers share."""
    return [*model.weights, *replicas.optimizer_variables(model.optimizer)]


def values(variables):
    return [np.array(v) for v in variables]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


# Replicas


def mixed_variables():
    kinds = ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
    kinds += ["int64", "uint64", "complex64"]
    made = [tf.Variable(tf.cast([[hvd.rank() + 1, 3]], kind)) for kind in kinds]
    made += [tf.Variable(tf.cast(hvd.rank() + 1, "bfloat16")), tf.Variable(hvd.rank() == hvd.size() - 1)]
    if not LEGACY:
        made += [keras.Variable(float(hvd.rank() + 1)), keras.Variable([hvd.rank() + 1.0], dtype="bfloat16")]
        made += [keras.random.SeedGenerator(hvd.rank()).state]
    return made


def check_broadcast_variables_of_any_dtype():
    root = hvd.size() - 1
    for inplace in (False, True):
        variables = mixed_variables()
        assert replicas.broadcast_variables(variables, root, inplace=inplace) is None
        replicas.assert_replicas_equal(variables)
        assert all(np.ravel(np.array(v))[0] == hvd.size() for v in variables[:14]) and bool(variables[14])

        variables = mixed_variables()

        @tf.function
        def compiled():
            replicas.broadcast_variables(variables[:5], root, inplace=inplace)
            replicas.broadcast_variables(variables[5:], root, inplace=inplace)

        compiled()
        replicas.assert_replicas_equal(variables)
        assert np.ravel(np.array(variables[0]))[0] == hvd.size()
    with pytest.raises(TypeError, match="strings"):
        replicas.broadcast_variables([tf.Variable("text")], 0)


def check_broadcast_variables_in_a_graph_of_tensorflow_1():
    for resources in (True, False):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            dtypes = (tf.float32, tf.int64, tf.bfloat16) if resources else (tf.float32, tf.int64)
            for dtype in dtypes:
                start = tf.cast([hvd.rank(), 5], dtype)
                tf.compat.v1.get_variable(dtype.name, initializer=start, use_resource=resources)
            variables = tf.compat.v1.global_variables()
            operation = replicas.broadcast_variables(variables, 1)
            session.run(tf.compat.v1.global_variables_initializer())
            session.run(operation)
            assert all((value == [1, 5]).all() for value in session.run(variables))


def check_replicas_that_differ_are_named():
    for wrong in (network("sgd", seed=hvd.rank()), {"a": 1.0, "b": np.float32(hvd.rank())}, [tf.Variable(hvd.rank())]):
        with pytest.raises(AssertionError, match=r"(kernel|b|Variable).* \(worker 1 and worker 0\)"):
            replicas.assert_replicas_equal(wrong)
    if hvd.rank() == 0:
        keras.layers.Dense(1)  # takes a name, so that the network's differ among workers
    replicas.assert_replicas_equal(network("sgd"))
    with pytest.raises(AssertionError, match="in 2 variables"):
        replicas.assert_replicas_equal({f"only here {hvd.rank() % 2}": 1.0})


# BroadcastGlobalVariablesCallback


def check_the_root_s_variables_after_the_first_batch():
    root = hvd.size() - 1
    for optimizer in optimizers():
        optimizer.learning_rate = 0.01 * (1 + hvd.rank())
        model = network(optimizer, seed=hvd.rank(), dtype="bfloat16")
        before = Recorder()
        broadcast = callbacks.BroadcastGlobalVariablesCallback(root)
        after = Recorder()
        model.fit(*data(8), callbacks=[before, broadcast, after])
        replicas.assert_replicas_equal(everything(model))
        assert_same(after.weights[0], hvd.broadcast_object(before.weights[0], root, name="weights"))
        assert abs(number(optimizer.learning_rate) - 0.01 * hvd.size()) < 1e-6
        # It is done once.
        fit(model, [broadcast])
        with pytest.raises(AssertionError):
            replicas.assert_replicas_equal(model)


def check_local_variables_are_not_broadcast():
    model = network("sgd", seed=hvd.rank())
    kernel, bias = model.layers[0].kernel, model.layers[0].bias
    before, after = Recorder(), Recorder()
    broadcast = callbacks.BroadcastGlobalVariablesCallback(0, "", kernel)
    broadcast.register_local_var(bias)
    model.fit(*data(8), verbose=0, callbacks=[before, broadcast, after])
    assert_same(after.weights[0][:2], before.weights[0][:2])
    replicas.assert_replicas_equal([v for v in model.weights if v is not kernel and v is not bias])
    with pytest.raises(AssertionError, match="kernel"):
        replicas.assert_replicas_equal([kernel])
    with pytest.raises(ValueError, match="'kernel'"):
        callbacks.BroadcastGlobalVariablesCallback(0, local_variables=["kernel"])


def check_workers_that_were_seeded_differently_draw_different_numbers():
    def broadcast(model):
        model.fit(*data(8), verbose=0, callbacks=[callbacks.BroadcastGlobalVariablesCallback(0)])

    def synchronize(model):
        elastic.KerasState(model).sync()

    for share in (broadcast, synchronize):
        model = network("sgd", seed=hvd.rank())
        share(model)
        replicas.assert_replicas_equal(everything(model))
        dropped = np.asarray(model.layers[2](np.ones((4, 200), "float32"), training=True)) == 0
        everyone = hvd.allgather_object(dropped.tolist(), name="dropped")
        assert everyone[0] != everyone[-1], share


# MetricAverageCallback


def check_metrics_are_averaged_for_the_callbacks_that_follow():
    mine, averaged = Recorder(), Recorder()
    extra = Edit(lambda logs: logs.update(text="a", array=np.array([hvd.rank(), 2.0]), whole=hvd.rank(), none=None))
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e6)
    model = network(SGD(0.01), seed=hvd.rank())
    used = [extra, mine, callbacks.MetricAverageCallback(), averaged, plateau]
    history = fit(model, used, epochs=3, validation_data=data(8)).history
    everyone = hvd.allgather_object(mine.logs, name="logs")
    for epoch, logs in enumerate(averaged.logs):
        for name in ("loss", "mae", "val_loss", "val_mae", "whole"):
            expected = np.mean([theirs[epoch][name] for theirs in everyone])
            assert type(logs[name]) is float and abs(logs[name] - expected) < 1e-12
            assert history[name][epoch] == logs[name]
        assert logs["text"] == "a" and (logs["array"] == [hvd.rank(), 2.0]).all() and logs["none"] is None
    assert everyone[0][0]["loss"] != everyone[1][0]["loss"]
    assert abs(number(model.optimizer.learning_rate) - 0.01 * 0.25) < 1e-8


def check_workers_with_other_metrics_are_an_error_everywhere():
    if hvd.rank() == 1:
        used = [Edit(lambda logs: logs.pop("mae"))]
    else:
        used = []
    with pytest.raises(ValueError, match=r"worker 1 has \['loss'\], worker 0 has \['loss', 'mae'\]"):
        fit(network("sgd"), [*used, callbacks.MetricAverageCallback()])


# Learning rates

STEPS = 3


def check_warmup_rises_batch_by_batch():
    recorder, printed = Recorder(), io.StringIO()
    warmup = callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2, verbose=1)
    with contextlib.redirect_stdout(printed):
        history = fit(network(SGD(0.4)), [warmup, recorder], epochs=3).history
    workers = hvd.size()
    batches = [min((batch + 1) / STEPS, 2) for batch in range(3 * STEPS)]
    expected = [0.4 / workers * (1 + (workers - 1) * t / 2) for t in batches]
    np.testing.assert_allclose(recorder.rates, expected, rtol=1e-6)
    np.testing.assert_allclose(history["lr"], expected[STEPS - 1 :: STEPS], rtol=1e-6)
    line = "Epoch 2: warmed up to learning rate 0.4.\n"
    assert printed.getvalue().strip("\n") == (line.strip() if hvd.rank() == 0 else "")


def check_schedules():
    cases = [
        (dict(multiplier=0.5), [1, 0.5, 0.25, 0.125]),
        (dict(multiplier=0.5, start_epoch=1, end_epoch=3), [0.7, 1, 0.5, 0.5]),
        (dict(multiplier=lambda epoch: 1 / (1 + epoch)), [1, 1 / 2, 1 / 3, 1 / 4]),
    ]
    for options, factors in cases:
        # Where the rate is set does not depend on what it is.
        made = (SGD(0.07), LossScaleOptimizer(SGD(0.07))) if options == cases[1][0] else (SGD(0.07),)
        for optimizer in made:
            recorder = Recorder()
            schedule = callbacks.LearningRateScheduleCallback(0.1, **options)
            fit(network(optimizer), [schedule, recorder], epochs=4)
            np.testing.assert_allclose(recorder.rates, 0.1 * np.repeat(factors, STEPS), rtol=1e-6)
            np.testing.assert_allclose([logs["lr"] for logs in recorder.logs], 0.1 * np.array(factors), rtol=1e-6)
    recorder = Recorder()
    smooth = callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 1 + epoch, staircase=False, steps_per_epoch=6)
    fit(network(SGD(0.1)), [smooth, recorder], epochs=2)
    batches = [epoch + batch / 6 for epoch in range(2) for batch in range(STEPS)]
    np.testing.assert_allclose(recorder.rates, [0.1 * (1 + t) for t in batches], rtol=1e-6)


def check_what_cannot_be_scheduled_is_an_error():
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    for callback in (
        callbacks.LearningRateScheduleCallback(0.1, 0.5),
        callbacks.LearningRateWarmupCallback(0.1),
    ):
        with pytest.raises(ValueError, match="is a schedule"):
            fit(network(SGD(decay)), [callback])
    with pytest.raises(ValueError, match="initial_lr"):
        callbacks.LearningRateScheduleCallback(None, 0.5)
    endless = tf.data.Dataset.from_generator(
        lambda: iter([data(8)] * 2), output_signature=(tf.TensorSpec((8, 6)), tf.TensorSpec((8, 3)))
    )
    model = network(SGD(0.1))
    with pytest.raises(ValueError, match="give LearningRateWarmupCallback steps_per_epoch"):
        model.fit(endless, callbacks=[callbacks.LearningRateWarmupCallback(0.1)], verbose=0)
    model.fit(endless, callbacks=[callbacks.LearningRateWarmupCallback(0.1, steps_per_epoch=2)], verbose=0)


def slope(optimizer, **options):
    """A model of one weight, 0 at first, whose gradient is always 1."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(optimizer, lambda y, prediction: tf.reduce_mean(prediction), **options)
    return model


def climb(model, used, epochs):
    recorder = Recorder()
    ones = np.ones((8 * STEPS, 1), "float32")
    model.fit(ones, ones, batch_size=8, epochs=epochs, callbacks=[*used, recorder], verbose=0)
    return recorder.rates, [float(weights[0][0, 0]) for weights in recorder.weights]


def expected_climb(rates, old, momentum=0.9, corrected=True, nesterov=False):
    velocity = weight = 0
    weights = []
    for rate in rates:
        factor = momentum * rate / old if corrected else momentum
        velocity = factor * velocity - rate
        weight += factor * velocity - rate if nesterov else velocity
        weights.append(weight)
        old = rate
    return weights


def check_the_momentum_is_corrected():
    cases = [
        (SGD(0.4, momentum=0.9), {}),
        (SGD(0.4, momentum=0.9, nesterov=True), {"nesterov": True}),
        (LossScaleOptimizer(SGD(0.4, momentum=0.9)), {}),
    ]
    if LEGACY:
        cases.append((keras.optimizers.legacy.SGD(0.4, momentum=0.9), {}))
    for optimizer, options in cases:
        used = [
            callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2),
            callbacks.LearningRateScheduleCallback(0.4, 0.1, start_epoch=3),
        ]
        model = slope(optimizer)
        rates, weights = climb(model, used, 5)
        np.testing.assert_allclose(weights, expected_climb(rates, 0.4, **options), rtol=1e-5)
        wrong = expected_climb(rates, 0.4, corrected=False, **options)
        assert hvd.size() == 1 or abs(weights[-1] - wrong[-1]) > 1e-2
        # In what is saved or copied it is the number that it was.
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        config = json.loads(json.dumps({**inner.get_config(), "learning_rate": 0.4}, default=float))
        assert abs(type(inner).from_config(config).get_config()["momentum"] - 0.9) < 1e-6
        assert type(copy.deepcopy(inner.get_config())["momentum"]) in (float, np.float32)


def check_the_momentum_is_corrected_in_a_model_that_was_trained_before():
    optimizer = SGD(0.2, momentum=0.9)
    model = slope(optimizer)
    climb(model, [], 1)
    model.set_weights([np.zeros((1, 1))])
    for variable in replicas.optimizer_variables(optimizer):
        if tuple(variable.shape):
            variable.assign(tf.zeros_like(variable))
    schedule = callbacks.LearningRateScheduleCallback(0.2, 0.5)
    rates, weights = climb(model, [schedule], 3)
    np.testing.assert_allclose(rates, np.repeat([0.2, 0.1, 0.05], STEPS), rtol=1e-6)
    np.testing.assert_allclose(weights, expected_climb(rates, 0.2), rtol=1e-5)


def check_the_momentum_stays_where_it_is_not_to_be_corrected():
    schedule = callbacks.LearningRateScheduleCallback(0.4, 0.5, momentum_correction=False)
    optimizer = SGD(0.4, momentum=0.9)
    rates, weights = climb(slope(optimizer), [schedule], 3)
    np.testing.assert_allclose(weights, expected_climb(rates, 0.4, corrected=False), rtol=1e-5)
    assert type(optimizer.momentum) is float
    for optimizer in (keras.optimizers.Adam(0.4), SGD(0.4), keras.optimizers.RMSprop(0.4, momentum=0.9)):
        rates, weights = climb(slope(optimizer), [callbacks.LearningRateScheduleCallback(0.4, 0.5)], 3)
        np.testing.assert_allclose(rates, np.repeat([0.4, 0.2, 0.1], STEPS), rtol=1e-6)
        assert np.isfinite(weights).all() and (np.diff(weights) < 0).all()


def check_the_momentum_is_not_corrected_for_several_steps_at_once():
    makes = [lambda: SGD(0.4, momentum=0.9), lambda: LossScaleOptimizer(SGD(0.4, momentum=0.9))]
    if LEGACY:
        makes.append(lambda: keras.optimizers.legacy.SGD(0.4, momentum=0.9))
    for make in makes:
        used = [
            callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2),
            callbacks.LearningRateScheduleCallback(0.4, 0.1, start_epoch=3),
        ]
        rates, weights = climb(slope(make(), steps_per_execution=STEPS), used, 5)
        assert len(set(rates)) == 4
        expected = expected_climb(np.repeat(rates, STEPS), 0.4, corrected=False)
        np.testing.assert_allclose(weights, expected[STEPS - 1 :: STEPS], rtol=1e-5)


# BestModelCheckpoint


def check_the_best_model_is_kept():
    losses = iter([3.0, 1.0, 2.0])
    for weights_only, name in ((False, "best.keras"), (True, "best.weights.h5")):
        losses = iter([3.0, 1.0, 2.0])
        with tempfile.TemporaryDirectory() as folder:
            best = callbacks.BestModelCheckpoint("loss", save_weights_only=weights_only)
            assert best.filepath is None
            best.filepath = str(Path(folder) / name)
            model, recorder = network("sgd"), Recorder()
            fit(model, [Edit(lambda logs: logs.update(loss=next(losses))), best, recorder], epochs=3)
            if weights_only:
                model.load_weights(best.filepath)
            else:
                model = keras.models.load_model(best.filepath)
        assert_same(model.get_weights(), recorder.weights[2 * STEPS - 1])


# CompressionCallback


def statistics(step, residuals):
    tensors = [
        TensorStats(f"t{i}", (8, 8), (8, 8), 2 * compressed, compressed, None, residual)
        for i, (compressed, residual) in enumerate(residuals)
    ]
    return CompressionStats(
        steps=step,
        bytes_sent=100 * step,
        bytes_received=100 * step,
        bytes_uncompressed=800,
        total_bytes_sent=100,
        total_bytes_received=100,
        total_bytes_uncompressed=800,
        tensors=tuple(tensors),
    )


def check_compression_is_in_the_history_and_in_tensorboard():
    answers = [
        statistics(1, [(True, None), (False, 0.0)]),
        statistics(2, [(True, 0.25), (True, 0.5), (True, None), (False, 0.75)]),
    ]
    for wrapped in (False, True):
        inner = SGD(0.1)
        optimizer = LossScaleOptimizer(inner) if wrapped else inner
        asked = iter(answers)
        inner.compression_stats = lambda: next(asked)
        with tempfile.TemporaryDirectory() as folder:
            used = [callbacks.CompressionCallback(), callbacks.MetricAverageCallback()]
            # TensorFlow comes without the package that writes summaries.
            if importlib.util.find_spec("tensorboard"):
                used.append(keras.callbacks.TensorBoard(folder))
            history = fit(network(optimizer), used, epochs=2).history
            assert history["compression_bytes"] == [100, 200]
            assert history["compression_ratio"] == [8, 4]
            assert history["compression_residual"] == [0.5]
            if len(used) == 3:
                found = scalars(folder)
                assert found["epoch_compression_bytes"] == [100, 200]
                assert found["epoch_compression_ratio"] == [8, 4]
                assert found["epoch_compression_residual"] == [0.5]
                assert len(found["epoch_loss"]) == 2


def scalars(folder):
    found = {}
    for file in Path(folder).rglob("*tfevents*"):
        for record in tf.data.TFRecordDataset(str(file)):
            for value in Event.FromString(record.numpy()).summary.value:
                if value.tag.startswith("epoch_"):
                    found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    return found


def check_an_optimizer_that_does_not_compress_is_an_error():
    for optimizer in (SGD(), LossScaleOptimizer(SGD())):
        with pytest.raises(TypeError, match=type(optimizer).__name__):
            fit(network(optimizer), [callbacks.CompressionCallback()])


# Elastic states


def check_a_keras_state_commits_and_restores():
    for optimizer in optimizers():
        model = network(optimizer)
        state = elastic.KerasState(model, epoch=0)
        fit(model, [])
        state.epoch = 1
        state.commit()
        committed = values(everything(model))
        fit(model, [])
        state.epoch = 2
        assert any((one != other).any() for one, other in zip(values(everything(model)), committed))
        state.restore()
        assert state.epoch == 1
        assert_same(values(everything(model)), committed)
        fit(model, [])


def check_a_keras_state_gives_a_newcomer_all_of_worker_0():
    for optimizer in optimizers():
        model = network(optimizer, seed=hvd.rank())
        if hvd.rank() == 0:
            fit(model, [])  # the others are new: their optimizers have no variables yet
        state = elastic.KerasState(model, optimizer if hvd.rank() else None, epoch=hvd.rank() + 5)
        before = hvd.broadcast_object(values(everything(model)), 0, name="before")
        state.sync()
        assert_same(values(everything(model)), before)
        assert state.epoch == 5
        replicas.assert_replicas_equal(everything(model))
        fit(model, [])
        state.restore()
        assert_same(values(everything(model)), before)
    with pytest.raises(ValueError, match="built"):
        elastic.KerasState(keras.Sequential([keras.layers.Dense(1)]), SGD())


def check_a_state_of_variables():
    variables = mixed_variables()
    state = TensorFlowState(variables, step=hvd.rank())
    mine = values(variables)
    variables[0].assign(variables[0] * 2)
    state.step = 7
    state.restore()
    assert_same(values(variables), mine)
    assert state.step == hvd.rank()
    state.sync()
    replicas.assert_replicas_equal(variables)
    assert state.step == 0
    assert TensorFlowState(step=3).step == 3
    with pytest.raises(ValueError, match="TensorFlow 1"):
        TensorFlowState(variables, session=tf.compat.v1.Session())


def check_state_callbacks():
    model = network("sgd")
    state = elastic.KerasState(model, batch=0, epoch=0)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((state.epoch, state.batch))

    batch, epoch = elastic.UpdateBatchStateCallback(state), elastic.UpdateEpochStateCallback(state)
    commit = elastic.CommitStateCallback(state, batches_per_commit=2)
    fit(model, [batch, epoch, commit, Look()], epochs=2)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert (state.epoch, state.batch) == (2, 0)
    # As after a change of workers, in the middle of epoch 2.
    state.batch = 1
    seen.clear()
    history = fit(model, [batch, epoch, commit, Look()], epochs=2, validation_data=data(8)).history
    assert seen == [(2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert len(history["val_loss"]) == 2
    state.batch = state.epoch = 99
    state.restore()
    assert (state.epoch, state.batch) == (4, 0)


def check_lost_workers_and_mistakes_are_told_apart():
    @_recoverable
    def fail(kind, message):
        raise kind(None, None, message)

    message = "{{node HorovodAllreduce_0}} Horovod has been shut down."
    with pytest.raises(Exception) as caught:
        fail(tf.errors.UnknownError, message)
    assert type(caught.value).__name__ == "HorovodInternalError"
    for mistake in (tf.errors.FailedPreconditionError, tf.errors.InvalidArgumentError):
        with pytest.raises(mistake):
            fail(mistake, "HorovodAllreduce: Mismatched allreduce tensor shapes")
    with pytest.raises(tf.errors.UnknownError):
        fail(tf.errors.UnknownError, "the disk is full")
