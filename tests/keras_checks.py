"""What users do with Keras models, in every worker; for whichever Keras TF_USE_LEGACY_KERAS chooses."""

import copy
import importlib
import pickle
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from tensorflow import keras

import cases
import horovod_powersgd.tensorflow as hvd
import horovod_powersgd.tensorflow.keras as hvd_keras
from equivalence import Equivalence
from horovod_powersgd import Accordion, PowerSGD, RandomK, Signum, TopK, reference
from horovod_powersgd.layout import trailing_columns
from tensorflow_trainee import KerasTrainee

KERAS_3 = hasattr(keras.optimizers, "LossScaleOptimizer")
LossScaleOptimizer = keras.optimizers.LossScaleOptimizer if KERAS_3 else keras.mixed_precision.LossScaleOptimizer
ROWS, COLUMNS, BATCH = 20, 30, 8
RUNS = [(config, "float32") for config in cases.CONFIGS]


def runs():
    """Half of the configurations with one worker, the others with two, with each Keras other ones. More workers meet
    this optimizer in tensorflow_checks."""
    return RUNS[2 * KERAS_3 + (hvd.size() == 1) :: 4]


equivalence = Equivalence(hvd, KerasTrainee, trailing_columns, runs)


def data(worker=None, batches=6):
    """A worker's inputs and targets."""
    rng = np.random.default_rng(hvd.rank() if worker is None else worker)
    x = rng.standard_normal((batches * BATCH, ROWS)).astype("float32")
    return x, rng.standard_normal((batches * BATCH, COLUMNS)).astype("float32")


def linear_model(optimizer, dtype=None, **options):
    """y = x W, from W = 0."""
    model = keras.Sequential(
        [
            keras.layers.Input((ROWS,)),
            # Named, since random numbers are drawn by the name that the first worker's Keras has counted.
            keras.layers.Dense(COLUMNS, use_bias=False, kernel_initializer="zeros", dtype=dtype, name="linear"),
        ],
        name="model",
    )
    model.compile(optimizer=optimizer, loss="mse", **options)
    return model


def fit(model, epochs=1, x=None, y=None, **options):
    own_x, own_y = data()
    x, y = own_x if x is None else x, own_y if y is None else y
    return model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, **options)


def mlp(optimizer, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((ROWS,)),
            keras.layers.Dense(40, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(COLUMNS),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse", **options)
    return model


def numpy_weights(model, config, learning_rate=lambda step: 0.5, passes=1, clip=None, batches=6):
    """The weights of linear_model after an epoch on all workers, by numpy."""
    kernel = model.layers[-1].trainable_weights[0]
    name = getattr(kernel, "path", None) or kernel.name.partition(":")[0]
    weights = np.zeros((ROWS, COLUMNS), "float32")
    states = [reference.State() for _ in range(hvd.size())]
    everyone = [data(worker) for worker in range(hvd.size())]
    sums = [np.zeros_like(weights) for _ in everyone]
    for batch in range(batches):
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        for total, (x, y) in zip(sums, everyone):
            total += 2 / (BATCH * COLUMNS) * x[part].T @ (x[part] @ weights - y[part])
        if (batch + 1) % passes == 0:
            if config is None:
                update = np.mean(sums, axis=0) / passes
            else:
                gradients = [{name: total / passes} for total in sums]
                updates = reference.simulate(gradients, states, config, trailing_columns, learning_rate(batch))
                update = updates[0][name]
            if clip:
                update = update * min(1, clip / np.linalg.norm(update))
            weights = weights - learning_rate(batch) * update
            for total in sums:
                total *= 0
    return weights


def check_gradients_that_are_given_are_exchanged_as_the_reference_does():
    equivalence.a_run_of_20_steps()


def fits():
    """(configuration, options of compile): all with one worker; with two, with each Keras other ones; and of the first
    four one in each launch of more workers."""
    configs = [PowerSGD(rank=2), TopK(0.1), PowerSGD(rank=1, num_iters_per_step=1), RandomK(0.2)]
    every = [(config, {}) for config in (*configs, PowerSGD(warmup_steps=2), None)]
    # Eagerly, all compressors take the same way to Horovod.
    every += [(config, {"run_eagerly": True}) for config in (configs[0], None)]
    if KERAS_3:
        every.append((configs[0], {"steps_per_execution": 3}))
    if hvd.size() > 2:
        return every[2 * (hvd.size() - 3) + hvd.mpi_enabled() :][:1]
    return every if hvd.size() == 1 else every[2:5] if KERAS_3 else every[:2]


def check_fit_equals_numpy():
    for config, options in fits():
        compression = config or hvd.Compression.none
        optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.5), compression=compression)
        model = linear_model(optimizer, **options)
        fit(model)
        assert cases.error(model.get_weights()[0], numpy_weights(model, config)) < 1e-3, (config, options)


def check_synchronized_normalization_does_as_the_reference_with_the_whole_batch():
    everyone = [np.float32(10 * w + np.random.default_rng(w).standard_normal((6, 4))) for w in range(hvd.size())]
    weights = np.random.default_rng(99).standard_normal((6 * hvd.size(), 4)).astype("float32")

    def trained(layer, batch, weights):
        layer.build(batch.shape)
        batch = tf.constant(batch)
        with tf.GradientTape() as tape:
            tape.watch(batch)
            normalized = layer(batch, training=True)
            loss = tf.reduce_sum(normalized * weights)
        return normalized.numpy(), tape.gradient(loss, batch).numpy()

    whole = keras.layers.BatchNormalization(momentum=0.5)
    expected = trained(whole, np.concatenate(everyone), weights)
    mine = slice(6 * hvd.rank(), 6 * hvd.rank() + 6)
    synchronized = hvd.SyncBatchNormalization(momentum=0.5)
    for found, of_all in zip(trained(synchronized, everyone[hvd.rank()], weights[mine]), expected):
        np.testing.assert_allclose(found, of_all[mine], rtol=1e-3, atol=1e-4)
    for moving in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(*(getattr(layer, moving).numpy() for layer in (synchronized, whole)), rtol=1e-4)
    with pytest.raises(ValueError, match="fused"):
        hvd.SyncBatchNormalization(fused=True)


def check_gradients_that_the_optimizer_computes_are_exchanged_once_as_the_reference_does():
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=PowerSGD(rank=2))
    v, w = (tf.Variable(np.zeros(shape, "float32"), name=name) for name, shape in (("v", (5, 4)), ("w", (3,))))
    factor, state = np.float32(1 + hvd.rank()), reference.State()
    gradients = {"v": np.arange(20, dtype="float32").reshape(5, 4), "w": np.ones(3, "float32")}
    mean = (1 + hvd.size()) / 2
    means = {name: mean * gradient for name, gradient in gradients.items()}
    [expected] = reference.simulate([means], [state], PowerSGD(rank=2), trailing_columns)

    def loss():
        return factor * sum(tf.reduce_sum(x * gradients[name]) for name, x in (("v", v), ("w", w)))

    found = optimizer.compute_gradients(loss, [v, w])
    optimizer.apply_gradients(found)
    for (gradient, variable), name in zip(found, ("v", "w")):
        np.testing.assert_allclose(gradient.numpy(), expected[name], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(-variable.numpy(), expected[name], rtol=1e-4, atol=1e-4)
    assert optimizer.compression_stats().steps == 1


def check_a_train_step_of_the_users_own():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(COLUMNS, use_bias=False, kernel_initializer="zeros")

        def call(self, x):
            return self.dense(x)

        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
            return {"loss": loss}

    model = Model()
    model.build((None, ROWS))
    model.compile(optimizer=hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.5), compression=PowerSGD(rank=2)))
    fit(model)
    assert cases.error(model.get_weights()[0], numpy_weights(model, PowerSGD(rank=2))) < 1e-3


def check_accordion_follows_the_optimizers_learning_rate():
    """The rate is lower after five steps: by a schedule, by a callback's assignment, or inside a loss scale."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.5, 0.25])

    class Halve(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rate = 0.5 if batch < 5 else 0.25
            if hasattr(self.model.optimizer.learning_rate, "assign"):
                self.model.optimizer.learning_rate.assign(rate)

    def wrapped(optimizer, config):
        return hvd_keras.DistributedOptimizer(optimizer, compression=config)

    optimizers = [lambda config: wrapped(keras.optimizers.SGD(schedule), config)]
    optimizers += [lambda config: wrapped(keras.optimizers.SGD(0.5), config)]
    if KERAS_3:
        optimizers += [lambda config: LossScaleOptimizer(wrapped(keras.optimizers.SGD(schedule), config))]
    else:
        optimizers += [lambda config: wrapped(keras.optimizers.legacy.SGD(schedule), config)]
    for low, high in ((PowerSGD(rank=3), PowerSGD(rank=1)), (TopK(0.3), TopK(0.1))):
        # The threshold is out of reach: without the decay, compression would stay high.
        config = Accordion(low, high, threshold=1000, interval=2)
        # Where the rate comes from does not depend on what is sent.
        for make in optimizers if isinstance(low, PowerSGD) else optimizers[:1]:
            model = linear_model(make(config))
            fit(model, callbacks=[Halve()])
            expected = numpy_weights(model, config, learning_rate=lambda step: 0.5 if step < 5 else 0.25)
            assert cases.error(model.get_weights()[0], expected) < 1e-3, (config, make)
            optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
            stats = optimizer.compression_stats().tensors[0]
            assert stats.decisions == ((0, "low"), (2, "low"), (4, "high"), (5, "low")), stats.decisions


def check_error_feedback_sgd_is_algorithm_2():
    shapes = {"matrix": (24, 32), "vector": (7,)}
    config, momentum = PowerSGD(rank=2), 0.7
    rates = [0.5, 0.5, 0.25, 0.25]
    optimizer = hvd_keras.DistributedOptimizer(hvd_keras.ErrorFeedbackSGD(0.5, momentum), compression=config)
    variables = {name: tf.Variable(tf.ones(shape), name=name) for name, shape in shapes.items()}
    states = [reference.OptimizerState() for _ in range(hvd.size())]
    parameters = [{name: np.ones(shape, "float32") for name, shape in shapes.items()} for _ in states]
    for step, rate in enumerate(rates):
        optimizer.learning_rate.assign(rate)
        everyones = [cases.gradients(step, worker, "float32", shapes) for worker in range(hvd.size())]
        mine = everyones[hvd.rank()]
        optimizer.apply_gradients([(tf.constant(mine[name]), variable) for name, variable in variables.items()])
        workers = zip(parameters, everyones, states)
        reference.lockstep([reference.algorithm_2(p, g, s, config, rate, momentum) for p, g, s in workers])
        found = {name: variable.numpy() for name, variable in variables.items()}
        cases.assert_close(found, parameters[0], 1e-4, step)
    with pytest.raises(ValueError, match="momentum"):
        hvd_keras.ErrorFeedbackSGD(momentum=1)


def check_backward_passes_are_summed_or_averaged():
    for average in (True, False):
        # Signs do not grow with the sum.
        for compression in (PowerSGD(rank=2), hvd.Compression.none, *([Signum()] if average else [])):
            optimizer = hvd_keras.DistributedOptimizer(
                keras.optimizers.SGD(0.5 if average else 0.25),
                compression=compression,
                backward_passes_per_step=2,
                average_aggregated_gradients=average,
            )
            model = linear_model(optimizer)
            fit(model)
            config = None if compression is hvd.Compression.none else compression
            assert cases.error(model.get_weights()[0], numpy_weights(model, config, passes=2)) < 1e-3
            assert int(optimizer.iterations) == 6
            if config:
                assert optimizer.compression_stats().steps == 3


def check_clipping_comes_after_the_exchange():
    optimizer = keras.optimizers.SGD(0.5, global_clipnorm=0.1)
    model = linear_model(hvd_keras.DistributedOptimizer(optimizer, compression=PowerSGD(rank=2)))
    fit(model)
    assert cases.error(model.get_weights()[0], numpy_weights(model, PowerSGD(rank=2), clip=0.1)) < 1e-3


def steps_behind(optimizer, spike=25, steps=50):
    """How many steps later a training with one bad batch is where the other one was before it."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal((ROWS, ROWS)) * 0.9 ** np.arange(ROWS) @ rng.standard_normal((ROWS, COLUMNS))
    x, noise = data(batches=steps)
    y = (x @ target).astype("float32")
    losses = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses[-1].append(np.mean((self.model.get_weights()[0] - target) ** 2))

    for bad in (False, True):
        if bad:
            y[spike * BATCH : (spike + 1) * BATCH] = 1000 * noise[:BATCH]
        losses.append([])
        wrapped = hvd_keras.DistributedOptimizer(optimizer(), compression=PowerSGD(rank=2))
        fit(linear_model(wrapped), x=x, y=y, callbacks=[Look()])
    usual, spoilt = losses
    return next((i for i in range(spike + 1, steps) if spoilt[i] <= usual[spike]), steps) - spike


def check_a_clipped_bad_batch_costs_few_steps():
    sgd = keras.optimizers.SGD
    makes = [lambda: sgd(2.0, global_clipnorm=1.0), lambda: sgd(2.0, clipvalue=0.05)]
    makes += [lambda: LossScaleOptimizer(sgd(2.0, clipnorm=1.0))]
    if not KERAS_3:
        makes += [lambda: keras.optimizers.legacy.SGD(2.0, global_clipnorm=1.0)]
    for number, make in enumerate(makes):
        behind = steps_behind(make)
        assert behind <= 5, (number, behind)


def check_replicas_stay_equal_with_whatever_optimizer():
    averaged = dict(weight_decay=0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=4)
    optimizers = [
        lambda: keras.optimizers.Adam(0.01, **averaged),
        lambda: keras.optimizers.RMSprop(keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.9)),
    ]
    if not KERAS_3:
        optimizers.append(lambda: keras.optimizers.legacy.Adam(0.01))
    for number, make in enumerate(optimizers):
        for options in ({}, {"backward_passes_per_step": 2}) if number == 0 else ({},):
            optimizer = make()
            wrapped = hvd_keras.DistributedOptimizer(optimizer, compression=PowerSGD(rank=2), **options)
            assert isinstance(wrapped, type(optimizer)) and type(wrapped).__name__ == type(optimizer).__name__
            model = mlp(wrapped)
            history = fit(model, epochs=2)
            assert history.history["loss"][1] < history.history["loss"][0]
            # Not by their names: what was tried before can have made more layers on one worker than on another.
            hvd.assert_replicas_equal({str(i): np.asarray(w) for i, w in enumerate(model.trainable_weights)})


def check_what_metrics_have_seen_is_no_part_of_the_replicas():
    class Noting(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = keras.layers.Dense(3), keras.metrics.Mean()

        def call(self, x):
            return self.layer(x)

    model = Noting()
    model(np.ones((2, 4), "float32"))
    hvd.broadcast_variables(model.layer.weights, root_rank=0)
    model.seen.update_state(hvd.rank())
    hvd.assert_replicas_equal(model)
    model.layer.bias.assign_add([0.0, hvd.rank(), 0.0])
    with pytest.raises(AssertionError, match="differ in 1 variables: .*bias"):
        hvd.assert_replicas_equal(model)


def check_loss_scaling_skips_a_step_on_all_workers():
    def wrapped(order):
        optimizer = keras.optimizers.SGD(0.5)
        if order == "outside":
            return LossScaleOptimizer(hvd_keras.DistributedOptimizer(optimizer, compression=PowerSGD(rank=2)))
        if order == "inside":
            return hvd_keras.DistributedOptimizer(LossScaleOptimizer(optimizer), compression=PowerSGD(rank=2))
        # Keras adds it.
        return hvd_keras.DistributedOptimizer(optimizer, compression=PowerSGD(rank=2))

    x, y = data()
    poisoned = x.copy()
    if hvd.rank() == hvd.size() - 1:
        poisoned[BATCH + 1] = np.inf
    try:
        for policy, order in (("float32", "outside"), ("float32", "inside"), ("mixed_float16", "by Keras")):
            (keras.config.set_dtype_policy if KERAS_3 else keras.mixed_precision.set_global_policy)(policy)
            model = linear_model(wrapped(order))
            optimizer = model.optimizer
            assert isinstance(optimizer, LossScaleOptimizer)
            fit(model, x=x)
            if policy == "float32":
                assert cases.error(model.get_weights()[0], numpy_weights(model, PowerSGD(rank=2))) < 1e-3
            scale = float(optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale)
            fit(model, x=poisoned)
            assert float(optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale) == scale / 2
            assert np.isfinite(model.get_weights()[0]).all()
            hvd.assert_replicas_equal({"kernel": model.get_weights()[0]})
            stats = (optimizer if order == "inside" else optimizer.inner_optimizer).compression_stats()
            assert stats.steps == 11 and stats.tensors[0].compressed
    finally:
        (keras.config.set_dtype_policy if KERAS_3 else keras.mixed_precision.set_global_policy)("float32")


def check_models_are_saved_with_the_wrapped_optimizer():
    # Keras 3 leaves the optimizer's variables out of .h5 files, and cannot go on training from one.
    suffixes = (".keras",) if KERAS_3 else (".keras", ".h5")
    kinds = [(suffix, keras.optimizers.Adam) for suffix in suffixes] + [(".keras", hvd_keras.ErrorFeedbackSGD)]
    for suffix, kind in kinds:
        optimizer = hvd_keras.DistributedOptimizer(kind(0.01), compression=PowerSGD(rank=2))
        model = mlp(optimizer)
        fit(model)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model{suffix}"
            model.save(path)
            plain, ours = keras.models.load_model(path), hvd_keras.load_model(path, compression=PowerSGD(rank=2))
        assert type(plain.optimizer) is kind
        assert isinstance(ours.optimizer, kind) and type(ours.optimizer) is not kind

        def kept(optimizer):
            variables = optimizer.variables
            return [np.asarray(v) for v in (variables() if callable(variables) else variables)]

        for loaded in (plain, ours):
            assert len(kept(loaded.optimizer)) == len(kept(optimizer))
            for mine, learned in zip(kept(loaded.optimizer), kept(optimizer)):
                np.testing.assert_array_equal(mine, learned)
        fit(ours)
        assert ours.optimizer.compression_stats().steps == 6
        hvd.assert_replicas_equal({str(i): np.asarray(w) for i, w in enumerate(ours.trainable_weights)})


class Decay(keras.optimizers.schedules.LearningRateSchedule):
    """Without a configuration."""

    def __call__(self, step):
        return 0.1 / (1.0 + tf.cast(step, tf.float32))


class Scaled(keras.optimizers.SGD):
    """A rate for each variable, which the configuration does not tell."""

    def __init__(self, factors):
        super().__init__(0.1, momentum=0.9)
        self.factors = factors

    def update_step(self, gradient, variable, *rest):
        factor = next((f for part, f in self.factors.items() if part in variable.name), 1.0)
        super().update_step(factor * tf.convert_to_tensor(gradient), variable, *rest)


class Repeated(keras.optimizers.SGD):
    """Takes each step twice."""

    def apply_gradients(self, grads_and_vars, **options):
        grads_and_vars = list(grads_and_vars)
        super().apply_gradients(grads_and_vars, **options)
        return super().apply_gradients(grads_and_vars, **options)


def optimizers_beyond_their_configuration():
    def set_later():
        optimizer = Scaled({})
        optimizer.factors = {"kernel": 0.5}
        return optimizer

    def excluding():
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=10.0)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer

    made = [lambda: keras.optimizers.SGD(Decay()), lambda: keras.optimizers.SGD(lambda: 0.05)]
    made += [lambda: Scaled({"bias": 0.0}), set_later, excluding, lambda: Repeated(0.1)]
    if not KERAS_3:
        made.append(lambda: keras.optimizers.legacy.SGD(Decay(), momentum=0.9))
    return made


def check_the_optimizer_that_is_given_trains():
    """Whatever its configuration tells, and whatever it has learned: as without Horovod."""
    x, y = data(0)  # the same on all workers

    def trained(make, wrap, learned=False):
        model = mlp(make())
        if learned:
            fit(model, x=x, y=y)
        model.compile(wrap(model.optimizer), "mse")
        fit(model, x=x, y=y)
        return model.get_weights()

    makes = [(make, False) for make in optimizers_beyond_their_configuration()]
    makes.append((lambda: keras.optimizers.Adam(0.01), True))
    for number, (make, learned) in enumerate(makes):
        plain = trained(make, lambda optimizer: optimizer, learned)
        ours = trained(make, hvd_keras.DistributedOptimizer, learned)
        for one, other in zip(ours, plain):
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=str(number))
    for optimizer in (keras.optimizers.Adam(0.01), LossScaleOptimizer(keras.optimizers.Adam(0.01))):
        assert hvd_keras.DistributedOptimizer(optimizer, compression=PowerSGD(rank=2)) is optimizer


def check_a_new_optimizer_begins_with_an_empty_memory():
    """As in cross-validation, the model's weights are set back; and an optimizer that is wrapped again is a new one."""
    for kind in [keras.optimizers.SGD] + ([] if KERAS_3 else [keras.optimizers.legacy.SGD]):
        same = hvd_keras.DistributedOptimizer(kind(0.5), op=hvd.Sum, backward_passes_per_step=2)
        model = linear_model(same)
        fit(model)
        for config in (PowerSGD(rank=1), TopK(0.1)):
            for optimizer in (kind(0.5), same):
                wrapped = hvd_keras.DistributedOptimizer(optimizer, compression=config)
                assert wrapped is optimizer and wrapped.__class__ is kind and type(wrapped).__mro__.count(kind) == 1
                model.set_weights([np.zeros((ROWS, COLUMNS))])
                model.compile(wrapped, "mse")
                fit(model)
                assert cases.error(model.get_weights()[0], numpy_weights(model, config)) < 1e-3, config
                assert wrapped.compression_stats().steps == 6


def check_copies_and_configurations_of_a_distributed_optimizer():
    config = PowerSGD(rank=2)
    for kind in [keras.optimizers.SGD] + ([] if KERAS_3 else [keras.optimizers.legacy.SGD]):
        optimizer = hvd_keras.DistributedOptimizer(kind(0.5), compression=config)
        for from_config in (optimizer.from_config, type(optimizer).from_config):
            assert type(from_config(optimizer.get_config())) is kind
        if not KERAS_3 and kind is keras.optimizers.SGD:
            with pytest.raises(TypeError, match="from_config"):
                copy.deepcopy(optimizer)
            continue
        if KERAS_3:
            assert type(pickle.loads(pickle.dumps(optimizer))) is kind
        fit(linear_model(optimizer))
        twin = copy.deepcopy(optimizer)
        assert isinstance(twin, kind) and twin is not optimizer
        model = linear_model(twin)
        fit(model)
        assert cases.error(model.get_weights()[0], numpy_weights(model, config)) < 1e-3
        assert twin.compression_stats().steps == optimizer.compression_stats().steps == 6


def own_mean(delta, state):
    """A compressor of one's own, with an average over the steps."""
    mean = yield hvd_keras.AllreduceMean(delta)
    average = 0.5 * state.get("average", np.zeros(state.shape, "float32")) + mean
    state.put("average", average)
    return average, delta


def check_a_resumed_job_goes_on_bit_for_bit():
    def compiled():
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        return mlp(hvd_keras.DistributedOptimizer(optimizer, compression=compression))

    adapting = Accordion(PowerSGD(rank=3), PowerSGD(rank=1), interval=4, threshold=2)
    # One worker tries all with Keras 2, two with Keras 3.
    compressions = (adapting,) if hvd.size() > 1 and not KERAS_3 else (PowerSGD(rank=2), own_mean, adapting)
    for compression in compressions:
        whole = compiled()
        fit(whole)
        state = whole.optimizer.compression_state_dict()
        with tempfile.TemporaryDirectory() as folder:
            whole.save(f"{folder}/model.keras")
            resumed = hvd_keras.load_model(f"{folder}/model.keras", compression=compression)
            resumed.optimizer.load_compression_state_dict(state)
        fit(whole)
        fit(resumed)
        assert resumed.optimizer.compression_stats().steps == 12
        for one, other in zip(whole.get_weights(), resumed.get_weights()):
            assert cases.error(one, other) <= cases.largest_error_of_a_repetition(hvd.size()), compression
    compression = PowerSGD(rank=1)
    other = compiled()
    other.optimizer.load_compression_state_dict(state)
    with pytest.raises(ValueError, match="another model or configuration"):
        fit(other)


def check_local_variables_stay_the_workers_own():
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=PowerSGD(rank=2))
    shared, local = (tf.Variable(tf.zeros((ROWS, COLUMNS)), name=name) for name in ("shared", "local"))
    optimizer.register_local_var(local)
    gradient = tf.fill((ROWS, COLUMNS), float(hvd.rank() + 1))
    optimizer.apply_gradients([(gradient, shared), (gradient, local)])
    np.testing.assert_allclose(shared, -(hvd.size() + 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(local, -(hvd.rank() + 1) / hvd.size(), rtol=1e-5)


def check_local_layers_stay_the_workers_own():
    """Built or not, also inside a loss scale."""
    for built in (False, True):
        # One worker tries all with Keras 2, two with Keras 3.
        for scaled in (built,) if hvd.size() > 1 and not KERAS_3 else (False, True):
            keras.utils.set_random_seed(0)
            local, shared = keras.layers.Dense(40, activation="relu"), keras.layers.Dense(COLUMNS)
            model = keras.Sequential(([keras.layers.Input((ROWS,))] if built else []) + [local, shared])
            optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1)) if scaled else keras.optimizers.SGD(0.1)
            options = dict(compression=PowerSGD(rank=2), local_layers=[local])
            model.compile(hvd_keras.PartialDistributedOptimizer(optimizer, **options), "mse")
            fit(model)
            everyone = hvd.allgather_object([layer.get_weights() for layer in (local, shared)])
            (first, together), (last, too) = everyone[0], everyone[-1]
            assert hvd.size() == 1 or (first[0] != last[0]).any(), (built, scaled)
            np.testing.assert_array_equal(together[0], too[0])
    with pytest.raises(ValueError, match="Layer"):
        hvd_keras.PartialDistributedOptimizer(keras.optimizers.SGD(0.1), local_layers=["dense"])


def check_workers_that_disagree_are_told_in_fit():
    if hvd.size() == 1:
        return
    rank = 3 if hvd.rank() == hvd.size() - 1 else 2
    model = linear_model(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.5), compression=PowerSGD(rank=rank)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="The workers do not agree") as told:
        fit(model)
    assert "rank=3" in str(told.value) and f"worker {hvd.size() - 1}" in str(told.value)


def check_the_callback_logs_compression():
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=PowerSGD(rank=2))
    model = mlp(optimizer)
    history = fit(model, epochs=2, callbacks=[hvd_keras.callbacks.CompressionCallback()]).history
    stats = optimizer.compression_stats()
    assert history["compression_bytes"] == [stats.bytes_sent] * 2
    assert history["compression_ratio"] == [stats.ratio] * 2
    assert history["compression_residual"][1] == max(t.residual for t in stats.tensors)


def check_xla_is_left_out_or_told():
    def compiled(jit_compile):
        optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=PowerSGD(rank=2))
        return linear_model(optimizer, jit_compile=jit_compile)

    with pytest.raises(RuntimeError, match="jit_compile=False"):
        fit(compiled(True))
    if not KERAS_3:
        return
    devices = tf.config.list_physical_devices
    try:
        # As if there were a GPU.
        tf.config.list_physical_devices = lambda kind=None: [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
        assert keras.Sequential([keras.layers.Dense(1)]).jit_compile
        assert not compiled("auto").jit_compile
        with tempfile.TemporaryDirectory() as folder:
            linear_model("sgd").save(f"{folder}/model.keras")
            assert not hvd_keras.load_model(f"{folder}/model.keras").jit_compile
    finally:
        tf.config.list_physical_devices = devices


def check_misuse_is_told():
    for options, match in (
        (dict(op=hvd.Adasum), "Average and Sum"),
        (dict(op=hvd.Sum, gradient_predivide_factor=2.0), "gradient_predivide_factor"),
        (dict(backward_passes_per_step=0), "backward_passes_per_step"),
        (dict(groups=0), "groups"),
    ):
        with pytest.raises(ValueError, match=match):
            hvd_keras.DistributedOptimizer(keras.optimizers.SGD(), compression=PowerSGD(), **options)
    with pytest.raises(TypeError, match="PowerSGD"):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(), compression="powersgd")
    other = importlib.import_module("tf_keras" if KERAS_3 else "keras")
    for module in (hvd, hvd_keras):
        for wrong, match in (
            ("adam", "the name 'adam'"),
            (keras.optimizers.Adam, "the class Adam"),
            (other.optimizers.Adam(), "of the package (tf_)?keras .* TF_USE_LEGACY_KERAS=1"),
            (None, "None"),
        ):
            with pytest.raises(TypeError, match=match):
                module.DistributedOptimizer(wrong, compression=PowerSGD())
        for misplaced in ((PowerSGD(),), ("name", PowerSGD())):
            with pytest.raises(TypeError, match="compression="):
                module.DistributedOptimizer(keras.optimizers.SGD(), *misplaced)
    with pytest.raises(TypeError, match="compression="):
        hvd_keras.PartialDistributedOptimizer(keras.optimizers.SGD(), "name", PowerSGD())
    with pytest.raises(TypeError, match="horovod_powersgd.tensorflow.DistributedOptimizer"):
        hvd_keras.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.1), compression=PowerSGD())
    optimizer = keras.optimizers.SGD()
    optimizer.apply_gradients = lambda pairs: None
    with pytest.raises(TypeError, match="apply_gradients in a subclass of SGD"):
        hvd_keras.DistributedOptimizer(optimizer, compression=PowerSGD())
    backend = keras.backend.backend
    try:
        keras.backend.backend = lambda: "torch"
        with pytest.raises(ImportError, match="torch .* KERAS_BACKEND=tensorflow"):
            importlib.reload(hvd_keras)
    finally:
        keras.backend.backend = backend
    with pytest.raises(RuntimeError, match="compressed nothing"):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(), compression=PowerSGD()).compression_stats()
