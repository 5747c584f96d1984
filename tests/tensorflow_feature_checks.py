"""What users do with tapes, in every worker of a TensorFlow job."""

import gc
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

import cases
import horovod_powersgd.tensorflow as hvd
from choices import looking_again
from horovod_powersgd import (
    Accordion,
    Allgather,
    AllreduceMean,
    Auto,
    Custom,
    Float16,
    GradiVeq,
    Int8,
    PowerSGD,
    RandomBlock,
    RandomK,
    Signum,
    TopK,
    clipping,
    reference,
)
from horovod_powersgd.choosing import Chooser
from horovod_powersgd.layout import trailing_columns
from horovod_powersgd.tensorflow.clipping import after_clipping
from horovod_powersgd.tensorflow.training import known_states
from horovod_powersgd.tensorflow.workers import Workers
from tensorflow_trainee import EagerTrainee, FunctionTrainee, KerasTrainee

SHAPE = (24, 32)


def matrix(step=0, worker=None, dtype="float32"):
    """A worker's gradient."""
    worker = hvd.rank() if worker is None else worker
    return cases.gradients(step, worker, dtype, {"matrix": SHAPE})["matrix"]


# What they keep is of every kind, and after three steps they are amid an interval.
KEEPING = [
    GradiVeq(slice_size=32, dimensions=4, learning_steps=2, compressed_steps=5),
    Accordion(PowerSGD(rank=3, num_iters_per_step=1), PowerSGD(rank=1, num_iters_per_step=1), threshold=2, interval=2),
    Accordion(TopK(0.2), TopK(0.1), interval=2),
    PowerSGD(rank=2, refresh_every=2),
    Signum(0.8),
]


def variable(name="matrix", dtype=tf.float32, shape=SHAPE):
    return tf.Variable(tf.zeros(shape, dtype), name=name)


def expected(config, steps, dtype="float32", name="matrix", gradient=matrix):
    """The reference's updates in so many steps."""
    states = [reference.State() for _ in range(hvd.size())]
    return [
        reference.simulate(
            [{name: gradient(step, w, dtype)} for w in range(hvd.size())], states, config, trailing_columns
        )[0][name]
        for step in range(steps)
    ]


def exchange(variables, gradients, config, **options):
    """By a new tape."""
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(tf.cast(v, g.dtype) * g) for v, g in zip(variables, gradients))
    return hvd.DistributedGradientTape(tape, compression=config, **options).gradient(loss, variables)


def check_no_python_runs_in_a_step_of_a_graph():
    # The first check, since what other checks have built before would not be built again.
    names = []
    numpy_function = tf.numpy_function

    def told(function, *arguments):
        def tell(*arrays):
            names.append(function.__qualname__)
            return function(*arrays)

        return numpy_function(tell, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "numpy_function", told)
        tf.numpy_function(np.negative, [tf.ones(3)], tf.float32)
        assert names.pop() == "negative"
        grows = Accordion(PowerSGD(rank=3), PowerSGD(rank=1), threshold=2, interval=1)
        for config in (PowerSGD(rank=2, warm_start=False), PowerSGD(rank=2, refresh_every=2), grows):
            trainee = FunctionTrainee(config, shapes={"matrix": SHAPE})
            for step in range(5):
                # A gradient of zeros takes spare columns; with Accordion, a rate that decays takes the larger rank.
                trainee.set_rate(1.0 if step < 4 else 0.5)
                trainee.exchange({"matrix": matrix(step) * (step != 1)})
            assert trainee.stats().steps == 5 and not names, (config, names)
            if config is grows:
                assert [choice for _, choice in trainee.stats().tensors[0].decisions][-2:] == ["high", "low"]


def check_the_state_is_the_variables_whatever_the_tape_and_the_function():
    config = PowerSGD(rank=2)
    traces = []

    @tf.function
    def with_a_batch(batch, v, gradient):
        traces.append(batch.shape)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(v * gradient) + tf.reduce_sum(batch)
        # The configuration is written inline.
        return hvd.DistributedGradientTape(tape, compression=hvd.PowerSGD(rank=2)).gradient(loss, v)

    @tf.function
    def another(v, gradient):
        return exchange([v], [gradient], hvd.PowerSGD(rank=2))[0]

    v = variable()
    steps = [
        lambda g: with_a_batch(tf.zeros(3), v, g),
        lambda g: another(v, g),
        lambda g: exchange([v], [g], config)[0],
        lambda g: with_a_batch(tf.zeros(5), v, g),
        lambda g: with_a_batch(tf.zeros((2, 2)), v, g),
        lambda g: another(v, g),
    ]
    for step, update, run in zip(range(6), expected(config, 6), steps):
        assert cases.error(run(tf.constant(matrix(step))).numpy(), update) < 1e-3, step
    assert len(traces) >= 3
    assert hvd.compression_stats([v]).steps == 6


def check_a_new_training_begins_with_nothing():
    def train(run, v, config):
        v.assign(tf.zeros_like(v))
        return [run(tf.constant(matrix(step))).numpy() for step in range(3)]

    for config in [PowerSGD(rank=2), *KEEPING]:
        v = variable()
        step = tf.function(lambda g, v=v: exchange([v], [g], config)[0])
        for training in range(2):
            for found, update in zip(train(step, v, config), expected(config, 3)):
                assert cases.error(found, update) < 1e-3, (config, training)
            # Tapes go on with one training until they are told. The same graph serves the next.
            hvd.forget_compression([v])
            assert hvd.compression_stats([v]).steps == hvd.compression_stats([v]).total_bytes_sent == 0
    with pytest.raises(RuntimeError, match="outside"):
        tf.function(lambda: hvd.forget_compression([v]))()


def check_variables_of_two_exchanges_are_saved_in_two_calls():
    parts = [EagerTrainee(PowerSGD(rank=2), shapes={name: SHAPE}) for name in ("generator", "critic")]
    for part, number in zip(parts, (1, 2)):
        for step in range(number):
            part.exchange({name: matrix(step) for name in part.variables})
    both = [variable for part in parts for variable in part.variables.values()]
    told = "exchanged in 2 parts.*begin with generator, critic"
    for call in (hvd.compression_state_dict, lambda variables: hvd.CompressionState(variables, PowerSGD(rank=2))):
        with pytest.raises(ValueError, match=told):
            call(both)
    with pytest.raises(ValueError, match=told):
        hvd.load_compression_state_dict(parts[0].saved(), both)
    assert [part.saved()["steps"] for part in parts] == [1, 2]


def check_each_optimizer_has_a_training_of_its_own():
    config, v1 = PowerSGD(rank=2), tf.compat.v1

    def optimizer():
        return hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(1.0), compression=config)

    def steps(optimizer, count):
        for step in range(count):
            before = v.numpy()
            gradient = tf.constant(matrix(step))
            optimizer.apply_gradients(optimizer.compute_gradients(lambda: tf.reduce_sum(v * gradient), [v]))
            yield before - v.numpy()

    v = variable()
    first, second = optimizer(), optimizer()
    for of_one, of_other, update in zip(steps(first, 3), steps(second, 3), expected(config, 3)):
        assert cases.error(of_one, update) < 1e-3 and cases.error(of_other, update) < 1e-3
    for step, update in enumerate(expected(config, 2)):
        assert cases.error(exchange([v], [tf.constant(matrix(step))], config)[0].numpy(), update) < 1e-3
    # What is done by the variables is done to the training that began last: the tape's.
    saved = hvd.compression_state_dict([v])
    assert saved["steps"] == hvd.compression_stats([v]).steps == 2 and len(known_states([v])) == 3
    # An optimizer that is gone leaves nothing.
    del first, second
    gc.collect()
    assert len(known_states([v])) == 1
    # What is loaded before the first exchange is the state of the training that begins next, and of no other.
    v = variable()
    hvd.load_compression_state_dict(saved, [v])
    kept, third = hvd.CompressionState([v], config), optimizer()
    for found, update in zip(steps(third, 1), expected(config, 3, gradient=lambda s, w, d: matrix(s % 2, w, d))[2:]):
        assert cases.error(found, update) < 1e-3
    for found, update in zip(steps(optimizer(), 1), expected(config, 1)):
        assert cases.error(found, update) < 1e-3
    assert int(kept.steps) == 3


def check_a_function_may_exchange_only_when_traced_again():
    v, config = variable(), PowerSGD(rank=2)

    @tf.function
    def step(gradient, exchanges):
        return exchange([v], [gradient], config)[0] if exchanges else gradient

    step(tf.constant(matrix()), False)
    for i, update in enumerate(expected(config, 2)):
        assert cases.error(step(tf.constant(matrix(i)), True).numpy(), update) < 1e-3

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def of_no_static_shape(gradient):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(w * gradient)
        return hvd.DistributedGradientTape(tape, compression=config).gradient(loss, w)

    w = variable()
    assert cases.error(of_no_static_shape(tf.constant(matrix())).numpy(), expected(config, 1)[0]) < 1e-3


def check_two_models_and_two_configurations_keep_apart():
    one, other = variable(), variable()
    both = EagerTrainee(PowerSGD(rank=2), shapes={"matrix": SHAPE})
    for step in range(3):
        gradient = tf.constant(matrix(step))
        expected_update = both.exchange({"matrix": matrix(step)})["matrix"]
        np.testing.assert_allclose(exchange([one], [gradient], PowerSGD(rank=2))[0], expected_update, 1e-4, 1e-5)
        exchange([other], [3 * gradient], PowerSGD(rank=2))
        exchange([one], [gradient], PowerSGD(rank=1))
    assert len(known_states([one])) == 2


def check_names_are_made_unique():
    first, second = variable("w"), variable("w")
    config = PowerSGD(rank=2)
    gradients = [tf.constant(matrix()), tf.constant(matrix())]
    one, two = exchange([first, second], gradients, config)
    assert [state.name for state in known_states([first, second])] == ["w", "w_1"]
    assert cases.error(one.numpy(), expected(config, 1, name="w")[0]) < 1e-5
    assert cases.error(two.numpy(), expected(config, 1, name="w_1")[0]) < 1e-5


def check_workers_may_number_layers_differently():
    for config in (
        PowerSGD(rank=2),
        PowerSGD(rank=2, num_iters_per_step=1),
        PowerSGD(rank=2, warm_start=False),
        RandomK(0.2),
    ):
        # The first gradient has too small a rank, and the spare columns take part.
        def gradient(step, worker, dtype):
            first = np.outer(np.arange(24), np.arange(32) + worker).astype(dtype)
            return matrix(step, worker, dtype) if step else first

        v = variable(f"sequential_{hvd.rank()}/dense_{hvd.rank() + 3}/kernel")
        for step, update in enumerate(expected(config, 4, name="sequential_0/dense_3/kernel", gradient=gradient)):
            found = exchange([v], [tf.constant(gradient(step, hvd.rank(), "float32"))], config)[0]
            assert cases.error(found.numpy(), update) < 1e-3, (config, step)


def check_a_persistent_tape_gives_several_gradients():
    config = PowerSGD(rank=2, num_iters_per_step=1)

    def step(v, w, gradient):
        with tf.GradientTape(persistent=True) as tape:
            one, other = tf.reduce_sum(v * gradient), tf.reduce_sum(w * gradient)
        tape = hvd.DistributedGradientTape(tape, compression=config)
        # Twice the same variable: its memory goes from one exchange to the next.
        return tape.gradient(one, v), tape.gradient(other, {"w": w})["w"], tape.gradient(one, [v])[0]

    for run in (step, tf.function(step)):
        v, w = variable("v"), variable("w")
        for i in range(2):
            first, other, second = run(v, w, tf.constant(matrix(i)))
            steps_of_v = expected(config, 2 * i + 2, name="v", gradient=lambda s, w, d: matrix(s // 2, w, d))
            assert cases.error(first.numpy(), steps_of_v[2 * i]) < 1e-3
            assert cases.error(second.numpy(), steps_of_v[2 * i + 1]) < 1e-3
            assert cases.error(other.numpy(), expected(config, i + 1, name="w")[i]) < 1e-3


def check_gradients_that_are_none_stay_none():
    v, unused = variable("v"), variable("unused")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v * matrix())
    tape = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=2))
    update, nothing = tape.gradient(loss, (v, unused))
    assert nothing is None
    assert cases.error(update.numpy(), expected(PowerSGD(rank=2), 1, name="v")[0]) < 1e-5
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v * matrix())
    tape = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=2))
    zero = tape.gradient(loss, [unused], unconnected_gradients=tf.UnconnectedGradients.ZERO)
    assert not zero[0].numpy().any()


def check_local_sources_stay_the_workers_own():
    for scale in (True, False):
        v, local = variable("v"), variable("local")
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((v + local) * matrix())
        tape = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=2), scale_local_gradients=scale)
        tape.register_local_source(local)
        update, own = tape.gradient(loss, [v, local])
        assert cases.error(update.numpy(), expected(PowerSGD(rank=2), 1, name="v")[0]) < 1e-5
        np.testing.assert_allclose(own, matrix() / (hvd.size() if scale else 1), rtol=1e-6)


def check_local_layers_stay_the_workers_own():
    shared, local = tf.keras.layers.Dense(16, use_bias=False), tf.keras.layers.Dense(16, use_bias=False)
    x = tf.constant(matrix())
    shared.build(x.shape), local.build(x.shape)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(shared(x)) + tf.reduce_sum(local(x))
    tape = hvd.PartialDistributedGradientTape(tape, compression=PowerSGD(rank=16), local_layers=local)
    update, own = tape.gradient(loss, [*shared.trainable_weights, *local.trainable_weights])
    mine = np.repeat(matrix().sum(0)[:, None], 16, 1)
    np.testing.assert_allclose(own, mine / hvd.size(), rtol=1e-4, atol=1e-4)
    mean = np.mean([np.repeat(matrix(0, w).sum(0)[:, None], 16, 1) for w in range(hvd.size())], axis=0)
    np.testing.assert_allclose(update, mean, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="[Ll]ayer"):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[3])


def check_local_layers_may_be_built_later():
    shared, local = (tf.keras.layers.Dense(16, kernel_initializer="ones") for _ in range(2))
    # A layer inside a local one is local.
    tape = tf.GradientTape(persistent=True)
    tape = hvd.PartialDistributedGradientTape(
        tape, compression=PowerSGD(rank=2), local_layers=[tf.keras.Sequential([local])], scale_local_gradients=False
    )
    with tape:
        loss = (hvd.rank() + 1.0) * (tf.reduce_sum(shared(matrix(0, 0))) + tf.reduce_sum(local(matrix(0, 0))))
    mean, own = tape.gradient(loss, [shared.trainable_weights[0], local.trainable_weights[0]])
    np.testing.assert_allclose(own / (hvd.rank() + 1), 2 * mean / (hvd.size() + 1), rtol=1e-3, atol=1e-3)
    locals_, globals_ = tape.get_local_and_global_gradients(loss, [*shared.trainable_weights, *local.trainable_weights])
    assert (len(locals_), len(globals_)) == (2, 2)


def check_keras_variables_are_known_by_their_path():
    layer = tf.keras.layers.Dense(SHAPE[1], use_bias=False, name="some_layer")
    layer.build((None, SHAPE[0]))
    kernel = layer.trainable_weights[0]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(kernel * matrix())
    update = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=2)).gradient(loss, [kernel])[0]
    name = getattr(kernel, "path", None) or kernel.name.partition(":")[0]
    assert known_states([kernel])[0].name == name
    assert cases.error(update.numpy(), expected(PowerSGD(rank=2), 1, name=name)[0]) < 1e-5


def check_sparse_gradients_are_gathered_or_compressed():
    # Each worker's own rows, and one that all have.
    rows = [hvd.rank() + 1, 0]
    for as_dense in (False, True):
        for wrap in (lambda f: f, tf.function):
            table, v = variable("table"), variable("v")

            @wrap
            def step(table=table, v=v):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(tf.gather(table, rows) * [[2.0], [4.0]]) + tf.reduce_sum(v * matrix())
                config = PowerSGD(rank=16, min_compression_rate=0)
                tape = hvd.DistributedGradientTape(tape, compression=config, sparse_as_dense=as_dense)
                return tape.gradient(loss, [table, v])

            for _ in range(2):
                update, _ = step()
            assert isinstance(update, tf.IndexedSlices) != as_dense
            dense = np.zeros(SHAPE)
            dense[0] = 4
            dense[1 : hvd.size() + 1] = 2 / hvd.size()
            np.testing.assert_allclose(tf.convert_to_tensor(update), dense, atol=1e-4)
            stats = hvd.compression_stats([table, v])
            assert stats.tensors[0].reason == (None if as_dense else "sparse")
            if hvd.size() > 1 and not as_dense:
                sent = 2 * SHAPE[1] * 4 + 2 * 4 + sum(SHAPE) * 16 * 4
                assert stats.bytes_sent == sent, (stats.bytes_sent, sent)


def check_variables_of_all_precisions():
    for dtype, rounding in ((tf.float16, 2**-10), (tf.bfloat16, 2**-7), (tf.float64, 1e-9)):
        for kind in (lambda f: f, tf.function):
            v, bias = variable("v", dtype), variable("bias", dtype, (7,))
            run = kind(lambda g, b, v=v, bias=bias: exchange([v, bias], [g, b], PowerSGD(rank=2)))
            computed = "float64" if dtype == tf.float64 else "float32"
            rounded = lambda s, w, d: tf.cast(tf.cast(matrix(s, w, d), dtype), d).numpy()  # noqa: E731
            for step, update in enumerate(expected(PowerSGD(rank=2), 3, computed, "v", rounded)):
                gradient, of_bias = tf.cast(matrix(step, dtype=computed), dtype), tf.cast(hvd.rank(), dtype)
                found, mean = run(gradient, tf.fill([7], of_bias))
                assert found.dtype == mean.dtype == dtype
                assert cases.error(tf.cast(found, update.dtype).numpy(), update) < 2 * rounding
                np.testing.assert_allclose(tf.cast(mean, tf.float32), (hvd.size() - 1) / 2, rtol=rounding)
    # Half precision's largest number is 65504.
    big = exchange([variable("v", tf.float16, (3,))], [tf.fill([3], tf.cast(40000.0, tf.float16))], PowerSGD())[0]
    np.testing.assert_array_equal(big, np.float16(40000))
    for compression in (hvd.Compression.none, PowerSGD()):
        bias = variable("bias", tf.bfloat16, (7,))
        mean = exchange([bias], [tf.fill([7], tf.cast(hvd.rank(), tf.bfloat16))], compression)[0]
        np.testing.assert_allclose(tf.cast(mean, tf.float32), (hvd.size() - 1) / 2, rtol=2**-7)


def check_the_loss_scale_can_change():
    plain, scaled = variable(), variable()
    scale = tf.Variable(1024.0)
    for step in range(4):
        scale.assign(1024.0 if step < 2 else 256.0)
        update = exchange([plain], [tf.constant(matrix(step))], PowerSGD(rank=2))[0]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(scaled * matrix(step)) * scale
        tape = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=2))
        tape.loss_scale = scale
        found = tape.gradient(loss, scaled) / scale
        np.testing.assert_allclose(found, update, rtol=1e-3, atol=1e-4)


def check_a_step_that_is_discarded_leaves_no_trace():
    for config in (PowerSGD(rank=2), *KEEPING[:3]):
        v = variable()

        @tf.function
        def step(gradient, is_taken, v=v, config=config):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(v * gradient)
            tape = hvd.DistributedGradientTape(tape, compression=config)
            tape.discardable = True
            update = tape.gradient(loss, v)
            if not is_taken:
                tape.discard()
            return update

        for i, update in enumerate(expected(config, 4)):
            for _ in range(2 if i else 1):
                step(tf.constant(100 * matrix(i + 7)), tf.constant(False))
            assert cases.error(step(tf.constant(matrix(i)), tf.constant(True)).numpy(), update) < 1e-3, (config, i)
            assert hvd.compression_stats([v]).steps == i + 1


def check_all_that_a_tape_has_exchanged_is_discarded():
    v, w, config = variable(), variable(), PowerSGD(rank=2)

    def exchange(gradient):
        with tf.GradientTape(persistent=True) as tape:
            one, other = tf.reduce_sum(v * gradient), tf.reduce_sum(w * gradient)
        tape = hvd.DistributedGradientTape(tape, compression=config)
        tape.discardable = True
        return tape, tape.gradient(one, v), tape.gradient(other, w), tape.gradient(one, v)

    exchange(tf.constant(matrix(7)))[0].discard()
    update, second = expected(config, 2, gradient=lambda s, w, d: matrix(0, w, d))
    for found, right in zip(exchange(tf.constant(matrix()))[1:], (update, update, second)):
        assert cases.error(found.numpy(), right) < 1e-3
    with pytest.raises(RuntimeError, match="discardable = True"):
        hvd.DistributedGradientTape(tf.GradientTape(), compression=config).discard()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v)
    tape = hvd.DistributedGradientTape(tape)
    tape.discardable = True
    tape.gradient(loss, v)
    tape.discard()


def check_a_tape_that_is_used_again_discards_its_last_step():
    v, config = variable(), PowerSGD(rank=2)
    tape = hvd.DistributedGradientTape(tf.GradientTape(persistent=True), compression=config)
    tape.discardable = True
    for i, update in enumerate(expected(config, 3)):
        for is_taken in (False, True):
            with tape:
                loss = tf.reduce_sum(v * matrix(i if is_taken else 9))
            found = tape.gradient(loss, v)
            if not is_taken:
                tape.discard()
        assert cases.error(found.numpy(), update) < 1e-3, i


def check_a_spike_that_is_clipped_costs_few_steps():
    rng = np.random.default_rng(0)
    target = rng.standard_normal((64, 48)) * 0.9 ** np.arange(48) @ rng.standard_normal((48, 96))
    target = target.astype("float32")

    def train(compression, clip, discardable, spike=None):
        """The losses of least squares."""
        v, losses = variable(shape=target.shape), []

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((x @ v - y) ** 2)
            tape = hvd.DistributedGradientTape(tape, compression=compression)
            tape.discardable = discardable
            v.assign_sub(0.2 * clip(tape, tape.gradient(loss, [v]))[0])
            return tf.reduce_mean((v - target) ** 2)

        for i in range(60 if spike is None else 66):
            rng = np.random.default_rng([i, hvd.rank()])
            x = rng.standard_normal((16, 64)).astype("float32")
            y = x @ target
            if i == spike:
                y = 1000 * rng.standard_normal(y.shape).astype("float32") * np.abs(y).mean()
            losses.append(float(step(x, y)))
        return losses

    def by_global_norm(tape, gradients):
        clipped, norm = tape.clip_by_global_norm(gradients, 1.0)
        np.testing.assert_array_equal(norm.shape, ())
        return clipped

    def by_norm(tape, gradients):
        clipped = [tf.clip_by_norm(gradient, 1.0) for gradient in gradients]
        tape.follow_clipping(gradients, clipped)
        return clipped

    for compression, *options in (
        (hvd.Compression.none, by_global_norm, False),
        (PowerSGD(rank=4), by_global_norm, False),
        (PowerSGD(rank=4, memory_dtype="bfloat16"), by_norm, True),
        (TopK(0.05), by_norm, False),
    ):
        usual, losses = train(compression, *options), train(compression, *options, spike=60)
        behind = next((i for i in range(60, 66) if losses[i] <= usual[59]), 66) - 60
        assert behind <= 5, (compression, options, behind)


def check_a_step_that_is_not_finite_is_not_clipped_from_the_memory():
    v, config = variable(), PowerSGD(rank=1)

    def step(gradient):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(v * gradient)
        tape = hvd.DistributedGradientTape(tape, compression=config)
        updates = tape.gradient(loss, [v])
        # By value, what is infinite becomes finite.
        tape.follow_clipping(updates, [tf.clip_by_value(update, -1.0, 1.0) for update in updates])
        return updates[0].numpy()

    step(matrix(0))
    (state,) = known_states([v])
    before = {name: kept.numpy() for name, kept in state.variables().items()}
    assert np.abs(before["memory"]).max() > 0 and 0 < before["usual_clipping"] < 1
    update = step(np.full(SHAPE, np.inf if hvd.rank() == 0 else 1, "float32"))
    assert not np.isfinite(update).any()
    for name, kept in state.variables().items():
        np.testing.assert_array_equal(kept.numpy(), before[name], err_msg=name)


def check_clipping_is_the_same_rule_as_without_tensorflow():
    usual, usual_here = None, tf.constant(0, tf.float64)
    for factor in (0.5, 0.6, 1.0, 0.001, 0.3, 0.29, 0.0, 1.0, 1.0, 0.2):
        of_memory, usual = clipping.after_clipping(factor, usual)
        of_memory_here, usual_here = after_clipping(tf.constant(factor, tf.float64), usual_here)
        np.testing.assert_allclose((of_memory_here, usual_here), (of_memory, usual), rtol=1e-12)
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=PowerSGD())
    with pytest.raises(ValueError, match="0 gradients, not 1"):
        tape.clip_by_global_norm([tf.zeros(3)], 1.0)


def shortened(delta, state):
    """A compressor of one's own that asks for all there is: the means of the rows, in half precision, an average of
    them over the steps, and which of the rows was longest on each worker."""
    xp, (rows, columns) = state.arrays, state.shape
    mean = yield AllreduceMean(xp.cast(xp.mean(delta, axis=1), "float16"))
    average = 0.5 * state.get("average", np.zeros(rows, "float32")) + xp.cast(mean, "float32")
    state.put("average", average)
    lengths = xp.sum(delta * delta, axis=1)
    longest = xp.top_k(lengths, 1)
    row, places, is_first = yield Allgather(
        (xp.take(delta, longest), xp.cast(longest, "int32"), xp.reshape(longest, ()) < state.worker)
    )
    everyones = xp.scatter(rows * columns, xp.integers(places) * columns + xp.arange(columns), row[:, 0])
    change = xp.reshape(xp.like(average, delta), (-1, 1)) * xp.like(xp.all(is_first) | True, delta)
    own = xp.scatter(rows * columns, longest * columns + xp.arange(columns), xp.take(delta, longest)[0])
    return xp.reshape(everyones, state.shape) / xp.like(state.workers, delta) + change, xp.reshape(own, state.shape)


def check_a_compressor_of_the_users_own():
    for wrap in (lambda f: f, tf.function):
        v = variable("v")
        run = wrap(lambda g, v=v: exchange([v], [g], shortened)[0])
        for step, update in enumerate(expected(shortened, 4, name="v")):
            assert cases.error(run(tf.constant(matrix(step))).numpy(), update) < 1e-3, step
        kept = hvd.compression_state_dict([v])["tensors"]["v"]["kept"]
        assert list(kept) == ["average"] and kept["average"].any()
        sent = SHAPE[0] * 2 + SHAPE[1] * 4 + 4 + 1
        gathered = SHAPE[1] * 4 + 4 + 1
        if hvd.size() > 1:
            stats = hvd.compression_stats([v])
            assert (stats.bytes_sent, stats.bytes_received) == (sent, sent + gathered * (hvd.size() - 1))
    state, again = hvd.compression_state_dict([v]), variable("v")
    with pytest.raises(ValueError, match="shortened"):
        hvd.load_compression_state_dict(state, [again])
    exchange([again], [tf.constant(matrix())], shortened)
    hvd.load_compression_state_dict(state, [again])
    assert hvd.compression_state_dict([again])["steps"] == 4


def check_a_step_that_is_not_finite_leaves_no_trace_of_any_compressor():
    in_fewer_bits = [PowerSGD(rank=2, wire_dtype=dtype) for dtype in ("float16", "int8")]
    for config in [*KEEPING, RandomBlock(0.2), Float16(), Int8(), *in_fewer_bits]:
        v, bias = variable("v"), variable("bias", shape=(7,))
        step = tf.function(lambda g, b, v=v, bias=bias: exchange([v, bias], [g, b], config))

        def kept(v=v):
            state = known_states([v])[0]
            everything = {**state.variables(), "s": state.counters.steps}
            return {name: variable.numpy() for name, variable in everything.items()}

        zeros = tf.zeros(7)
        for i in range(3):
            step(tf.constant(matrix(i)), zeros)
        before = kept()
        poisoned, biased = matrix(3), np.zeros(7, "float32")
        if hvd.rank() == hvd.size() - 1:
            poisoned[2, 5] = np.inf
            biased[4] = np.nan
        assert not np.isfinite(step(tf.constant(poisoned), zeros)[0]).all(), config
        # A vector of another kind fails the step of all.
        assert np.isfinite(step(tf.constant(matrix(3)), tf.constant(biased))[0]).all(), config
        for name, value in kept().items():
            np.testing.assert_array_equal(value, before[name], err_msg=f"{config} {name}")
        for i, update in list(enumerate(expected(config, 4, name="v")))[3:]:
            assert cases.error(step(tf.constant(matrix(i)), zeros)[0].numpy(), update) < 1e-3, config


def check_join_with_uneven_data():
    shapes = {"linear": (48, 64)}
    for config in (PowerSGD(rank=2), Accordion(PowerSGD(rank=2), PowerSGD(rank=1), interval=1)):
        trainee = EagerTrainee(config, shapes=shapes)
        # The first worker has no data at all; the others find their factors without it.
        for step in range(hvd.rank()):
            trainee.exchange(cases.gradients(step, hvd.rank(), "float32", shapes))
        assert hvd.join() == hvd.size() - 1
        # Those that joined first take their factors from the one that went farthest.
        trainee.exchange(cases.gradients(9, hvd.rank(), "float32", shapes))
        assert trainee.state().steps == hvd.size()


def check_with_auto_a_worker_joins_where_a_candidate_gathers():
    trainee = EagerTrainee(Auto(TopK(0.1)), shapes={"linear": (48, 64)})
    with looking_again, mock.patch.multiple(Chooser, _promising=lambda *_: set(), interval=2):
        for step in range(12 + 6 * hvd.rank()):
            trainee.exchange(cases.gradients(step, hvd.rank(), "float32", {"linear": (48, 64)}))
        assert hvd.join() == hvd.size() - 1
    assert trainee.stats().steps == 12 + 6 * hvd.rank()


def check_a_compressor_of_ones_own_knows_its_tensors():
    seen = set()

    def noting(delta, state):
        seen.add(state.name)
        state.get("number", 0)
        state.put("number", 7)  # a number of Python's, too
        mean = yield AllreduceMean(delta)
        return mean, delta

    trainee = EagerTrainee(noting, shapes={"linear": (48, 64)})
    trainee.exchange(cases.gradients(0, hvd.rank(), "float32", {"linear": (48, 64)}))
    (kept,) = known_states(trainee.variables.values())
    assert seen == {kept.name} and kept.kept["number"].numpy() == 7


def check_gathering_while_a_worker_has_joined_is_refused():
    if hvd.size() == 1:
        return
    v, w, table = variable("v"), variable("w"), variable("table")
    in_function = tf.function(lambda g: exchange([v], [g], TopK(0.1))[0])

    def look_up():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, [0, 1]))
        return hvd.DistributedGradientTape(tape, compression=RandomK(0.1)).gradient(loss, table)

    for i in range(3):
        exchange([v], [tf.constant(matrix(i))], TopK(0.1))
        in_function(tf.constant(matrix(i)))
        exchange([w], [tf.constant(matrix(i))], RandomK(0.1))
        look_up()
    if hvd.rank() != hvd.size() - 1:
        refused = "(?s)hvd.join.*TopK.*PowerSGD or RandomK"
        with pytest.raises(RuntimeError, match=refused):
            exchange([v], [tf.constant(matrix())], TopK(0.1))
        with pytest.raises(tf.errors.InvalidArgumentError, match=refused):
            in_function(tf.constant(matrix()))
        with pytest.raises(RuntimeError, match="hvd.join.*sparse_as_dense"):
            look_up()
        # What only asks for means goes on.
        exchange([w], [tf.constant(matrix())], RandomK(0.1))
    hvd.join()
    exchange([v], [tf.constant(matrix())], TopK(0.1))
    exchange([w], [tf.constant(matrix())], RandomK(0.1))
    assert [hvd.compression_stats([variable]).steps for variable in (v, w)] == [7, 5]


def check_a_constant_is_not_gathered_in_a_branch_that_is_not_taken():
    workers = Workers(hvd.global_process_set, "untaken")

    def build(taken):
        return tf.cond(taken, lambda: workers.allgather(tf.ones(2), "constant"), lambda: tf.zeros(2))

    in_function = tf.function(build, autograph=False)
    if hvd.rank() == 0:
        # A worker that gathered would wait for the others.
        in_function(tf.constant(False))
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            taken = tf.compat.v1.placeholder(tf.bool, ())
            session.run(build(taken), {taken: False})
    assert in_function(tf.constant(True)).shape == build(tf.constant(True)).shape == 2 * hvd.size()


def check_the_tape_knows_the_learning_rate():
    config = Accordion(PowerSGD(rank=3), PowerSGD(rank=1), threshold=9, interval=2)
    until_the_decay = (0, "low"), (2, "low"), (4, "high")
    for decays, decided in ((True, (*until_the_decay, (5, "low"))), (False, until_the_decay)):
        v, rate = variable("v"), tf.Variable(0.5)

        @tf.function
        def step(gradient, v=v, rate=rate):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(v * gradient)
            tape = hvd.DistributedGradientTape(tape, compression=config, op=hvd.Sum)
            tape.learning_rate = rate
            return tape.gradient(loss, v)

        states = [reference.State() for _ in range(hvd.size())]
        for i in range(6):
            rate.assign(0.25 if decays and i == 5 else 0.5)
            gradients = [{"v": matrix(i, w)} for w in range(hvd.size())]
            update = reference.simulate(gradients, states, config, trailing_columns, float(rate))[0]["v"]
            found = step(tf.constant(matrix(i)))
            assert cases.error(found.numpy(), update * np.float32(hvd.size())) < 1e-3
            stats = hvd.compression_stats([v])
            now = config.low if stats.tensors[0].decisions[-1][1] == "low" else config.high
            assert stats.tensors[0].rank == now.rank
            assert (stats.bytes_sent, stats.bytes_received) == now.traffic([SHAPE], hvd.size())
        assert stats.tensors[0].decisions == decided == states[0].regimes["v"].decisions


def check_process_sets_exchange_among_themselves():
    if hvd.size() < 3:
        return
    pair = hvd.add_process_set([0, 2])
    v = variable()
    for config in (PowerSGD(rank=2), TopK(0.1), Int8()):
        with cases.in_two_rounds():
            update = exchange([v], [tf.constant(matrix())], config, process_set=pair)[0].numpy()
        if hvd.rank() in (0, 2):
            states = [reference.State(), reference.State()]
            gradients = [{"matrix": matrix(0, w)} for w in (0, 2)]
            with cases.in_two_rounds():
                both = reference.simulate(gradients, states, config, trailing_columns)[0]["matrix"]
            assert cases.error(update, both) < 1e-5
        else:
            np.testing.assert_array_equal(update, matrix())
    hvd.allgather_object(0, name="before the set goes")
    hvd.remove_process_set(pair)


def check_workers_that_disagree_are_told():
    last = hvd.rank() == hvd.size() - 1
    differences = {
        "rank=3": dict(config=PowerSGD(rank=3 if last else 2)),
        "Sum": dict(op=hvd.Sum if last else hvd.Average),
        "24, 31": dict(shape=(24, 31) if last else SHAPE),
        "other": dict(name="other" if last else "matrix"),
        "float64": dict(dtype=tf.float64 if last else tf.float32),
    }

    def run(wrap, config=PowerSGD(rank=2), op=hvd.Average, shape=SHAPE, name="matrix", dtype=tf.float32):
        v = variable(name, dtype, shape)
        return wrap(lambda: exchange([v], [tf.ones(shape, dtype)], config, op=op)[0])()

    for difference, options in differences.items():
        for wrap, error in ((lambda f: f, RuntimeError), (tf.function, tf.errors.InvalidArgumentError)):
            if hvd.size() == 1:
                run(wrap, **options)
                continue
            with pytest.raises(error) as told:
                run(wrap, **options)
            assert "The workers do not agree" in str(told.value) and difference in str(told.value), told.value
            assert f"worker {hvd.size() - 1}" in str(told.value)
    # The job can go on.
    np.testing.assert_allclose(run(tf.function), 1, rtol=1e-5)


def check_workers_may_trace_in_any_order():
    config, shapes = PowerSGD(rank=2), {"first": SHAPE, "second": (32, 24)}
    variables = {name: variable(name, shape=shape) for name, shape in shapes.items()}

    def step_of(v):
        return tf.function(lambda gradient: exchange([v], [gradient], config)[0])

    steps = {name: step_of(v) for name, v in variables.items()}
    if hvd.rank() == 0:
        # As to look at its graph.
        steps["second"].get_concrete_function(tf.zeros((32, 24)))
    for name in shapes:
        gradient = matrix() if name == "first" else matrix().T
        of_all = expected(config, 1, name=name, gradient=lambda *a: matrix(*a) if name == "first" else matrix(*a).T)
        assert cases.error(steps[name](tf.constant(gradient)).numpy(), of_all[0]) < 1e-3


def check_several_first_exchanges_in_one_function():
    variables = [variable("several", shape=(24, 32 + i // 2)) for i in range(6)]

    @tf.function
    def step():
        return [exchange([v], [tf.ones(v.shape)], PowerSGD(rank=2))[0] for v in variables]

    for update in [*step(), *step()]:
        np.testing.assert_allclose(update, tf.ones(update.shape), rtol=1e-5)


def check_a_checkpoint_goes_on_where_it_was():
    import pickle
    import tempfile

    of_powersgd = PowerSGD(rank=2), PowerSGD(rank=2, num_iters_per_step=1), PowerSGD(rank=2, warm_start=False)
    shapes = {name: cases.SHAPES[name] for name in ("linear", "vector")}
    for number, config in enumerate((*of_powersgd, *KEEPING[:3], Custom(shortened))):
        whole = FunctionTrainee(config, shapes=shapes)
        for step in range(3):
            whole.exchange(cases.gradients(step, hvd.rank(), "float32"))
        saved = pickle.dumps(hvd.compression_state_dict(whole.variables.values()))
        kept = hvd.CompressionState(whole.variables.values(), config)
        with tempfile.TemporaryDirectory() as folder:
            path = tf.train.Checkpoint(compression=kept).save(f"{folder}/worker-{hvd.rank()}")
            by_pickle, by_checkpoint = FunctionTrainee(config, shapes=shapes), EagerTrainee(config, shapes=shapes)
            known = None if config.description()["compressor"] != "Custom" else config
            hvd.load_compression_state_dict(pickle.loads(saved), by_pickle.variables.values(), compression=known)
            kept = hvd.CompressionState(by_checkpoint.variables.values(), config)
            tf.train.Checkpoint(compression=kept).restore(path).assert_consumed()
        # What is kept does not depend on how it was: both go on from the first, then each in turn.
        going_on = (by_pickle, by_checkpoint) if number == 0 else ((by_pickle, by_checkpoint)[number % 2],)
        for step in range(3, 6):
            gradients = cases.gradients(step, hvd.rank(), "float32")
            updates, memory = whole.exchange(gradients), whole.state().memory
            largest = cases.largest_error_of_a_repetition(hvd.size())
            for resumed in going_on:
                cases.assert_close(resumed.exchange(gradients), updates, largest, (config, step))
                cases.assert_close(resumed.state().memory, memory, largest, (config, step, "memory"), updates)
                decided, expected_decisions = ([t.decisions for t in w.stats().tensors] for w in (resumed, whole))
                assert decided == expected_decisions


def check_a_checkpoint_serves_another_number_of_workers():
    trainee = EagerTrainee(PowerSGD(rank=2))
    for step in range(2):
        trainee.exchange(cases.gradients(step, hvd.rank(), "float32"))
    states = hvd.allgather_object(hvd.compression_state_dict(trainee.variables.values()), name="states")
    resumed = EagerTrainee(PowerSGD(rank=2))
    # As if each of them had been two.
    twice = [
        {**state, "workers": 2 * hvd.size(), "worker": 2 * i + j} for i, state in enumerate(states) for j in (0, 1)
    ]
    hvd.load_compression_state_dict(iter(twice), resumed.variables.values())
    # Workers may call a variable differently, as a model's that only one has loaded.
    tensors = {f"other/{name}": tensor for name, tensor in twice[-1]["tensors"].items()}
    hvd.load_compression_state_dict([*twice[:-1], {**twice[-1], "tensors": tensors}], resumed.variables.values())
    memory = hvd.allgather_object(known_states([resumed.variables["linear"]])[0].memory.numpy(), name="memories")
    mean = np.mean([state["tensors"]["linear"]["memory"] for state in states], axis=0)
    np.testing.assert_allclose(np.mean(memory, axis=0), mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needed"):
        hvd.load_compression_state_dict(twice[1:], resumed.variables.values())
    with pytest.raises(ValueError, match="alone"):
        hvd.load_compression_state_dict(twice[0], resumed.variables.values())
    with pytest.raises(ValueError, match="linear"):
        hvd.load_compression_state_dict(states, [variable("other")])


def check_misuse_is_told():
    def tape(**options):
        return hvd.DistributedGradientTape(tf.GradientTape(), **options)

    for options, match in (
        (dict(compression=PowerSGD(), op=hvd.Adasum), "Adasum"),
        (dict(compression=PowerSGD(), op=hvd.Sum, gradient_predivide_factor=2.0), "gradient_predivide_factor"),
        (dict(compression=PowerSGD(), groups=0), "groups"),
    ):
        with pytest.raises(ValueError, match=match):
            tape(**options)
    for wrong in ("powersgd", PowerSGD):
        with pytest.raises(TypeError, match="such as hvd.PowerSGD"):
            tape(compression=wrong)
    assert isinstance(tape(compression=PowerSGD()), tf.GradientTape)
    with pytest.raises(RuntimeError, match="compressed nothing"):
        tape().compression_stats()

    v = variable()
    compiled = tf.function(lambda g: exchange([v], [g], PowerSGD(rank=2)), jit_compile=True)
    with pytest.raises(RuntimeError, match="jit_compile=False"):
        compiled(tf.constant(matrix()))


def check_a_compressor_in_the_wrong_place_is_told():
    x, config = tf.ones(SHAPE), PowerSGD(rank=4)
    for wrap in (hvd.DistributedGradientTape, hvd.PartialDistributedGradientTape):
        with pytest.raises(TypeError, match="device_dense.*compression="):
            wrap(tf.GradientTape(), config)
    for function in (hvd.allreduce, hvd.grouped_allreduce, hvd.reducescatter, hvd.grouped_reducescatter):
        tensors = [x] if "grouped" in function.__name__ else x
        for arguments, options in (((config,), {}), ((), {"compression": config})):
            with pytest.raises(TypeError, match="PowerSGD.*compresses gradients"):
                function(tensors, *arguments, **options)
    np.testing.assert_array_equal(tf.function(lambda: hvd.allreduce(x, compression=hvd.Compression.fp16))(), x)


def check_a_jacobian_is_told_where_to_come_from():
    v = variable(shape=(3,))
    with tf.GradientTape(persistent=True) as inner:
        y = v**2
    tape = hvd.DistributedGradientTape(inner, compression=PowerSGD(rank=2))
    for jacobian in (tape.jacobian, tape.batch_jacobian):
        with pytest.raises(RuntimeError, match="tf.GradientTape that you wrap"):
            jacobian(y, v)
    # As it says.
    np.testing.assert_array_equal(inner.jacobian(y, v), np.zeros((3, 3)))
    np.testing.assert_array_equal(tape.gradient(y, v), np.zeros(3))


def check_replicas_are_equal_whatever_batch_normalization_saw():
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((4,)),
            tf.keras.layers.BatchNormalization(),
            tf.keras.Sequential([tf.keras.layers.Dropout(0.5), tf.keras.layers.BatchNormalization(scale=False)]),
            tf.keras.layers.Dense(3, kernel_initializer="ones"),
        ]
    )
    model(np.full((5, 4), hvd.rank() + 1.0, "float32"), training=True)
    hvd.assert_replicas_equal(model)
    if hvd.size() == 1:
        return
    with pytest.raises(AssertionError, match="moving_mean"):
        hvd.assert_replicas_equal(model.weights)
    model.layers[0].beta.assign(tf.fill([4], float(hvd.rank())))
    with pytest.raises(AssertionError, match="1 variables.*beta"):
        hvd.assert_replicas_equal(model)


def check_tensors_are_averaged_as_they_are():
    x = tf.constant(matrix())
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(x * matrix())
    mean = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=1)).gradient(loss, x)
    np.testing.assert_allclose(mean, np.mean([matrix(0, w) for w in range(hvd.size())], axis=0), rtol=1e-4, atol=1e-5)


def check_optimizers_of_tensorflow_1_in_a_session():
    v1 = tf.compat.v1
    for passes in (1, 2):
        with tf.Graph().as_default(), v1.Session() as session:
            v = v1.get_variable("matrix", SHAPE, initializer=v1.zeros_initializer(), use_resource=True)
            gradient = v1.placeholder(tf.float32, SHAPE)
            optimizer = hvd.DistributedOptimizer(
                v1.train.GradientDescentOptimizer(1.0), compression=PowerSGD(rank=2), backward_passes_per_step=passes
            )
            train = optimizer.minimize(tf.reduce_sum(v * gradient))
            # No variable of ours is to be initialised, saved or restored.
            assert v1.global_variables() == [v]
            session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
            before = session.run(v)
            for step, update in enumerate(expected(PowerSGD(rank=2), 4)):
                for _ in range(passes):
                    session.run(train, {gradient: matrix(step) / passes})
                after = session.run(v)
                np.testing.assert_allclose(before - after, update, rtol=1e-3, atol=1e-4)
                before = after


def check_other_compressors_in_a_session():
    v1 = tf.compat.v1
    for config in KEEPING[:4]:
        with tf.Graph().as_default(), v1.Session() as session:
            v = v1.get_variable("matrix", SHAPE, initializer=v1.zeros_initializer(), use_resource=True)
            gradient, rate = v1.placeholder(tf.float32, SHAPE), v1.placeholder(tf.float32, ())
            optimizer = hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(rate), compression=config)
            train = optimizer.minimize(tf.reduce_sum(v * gradient))
            assert v1.global_variables() == [v]
            session.run(v1.global_variables_initializer())
            states = [reference.State() for _ in range(hvd.size())]
            before = session.run(v)
            for step in range(7):
                now = 0.5 if step < 5 else 0.25
                gradients = [{"matrix": matrix(step, w)} for w in range(hvd.size())]
                update = reference.simulate(gradients, states, config, trailing_columns, now)[0]["matrix"]
                session.run(train, {gradient: matrix(step), rate: now})
                after = session.run(v)
                assert cases.error((before - after) / np.float32(now), update) < 1e-3, (config, step)
                before = after


def check_numerics_are_found_sound_where_they_are():
    # The last check: functions that are built now keep asking. It takes its time: each op is asked.
    tf.debugging.enable_check_numerics(stack_height_limit=2)
    try:
        for config, wrap in (
            (KEEPING[1], lambda f: f),
            (PowerSGD(rank=2, warmup_steps=1), tf.function),
            (Signum(), tf.function),
            (Custom(shortened), tf.function),
        ):
            v, bias = variable("v"), variable("bias", shape=(7,))
            step = wrap(lambda g, b, v=v, bias=bias: exchange([v, bias], [g, b], config))
            for i in range(3):
                step(tf.constant(matrix(i)), tf.zeros(7))
            assert hvd.compression_stats([v, bias]).steps == 3
        trainee = KerasTrainee(PowerSGD(rank=2), shapes={"matrix": SHAPE})
        for i in range(2):
            trainee.exchange({"matrix": matrix(i)})
        # What is not finite is told of, as it is without a compressor. Not in a graph: there, what runs beside the
        # operation that fails may have asked for an average, and would wait for workers that have not.
        with pytest.raises(tf.errors.InvalidArgumentError, match="Inf|NaN"):
            exchange([v, bias], [tf.constant(matrix(3) + np.float32("inf")), tf.zeros(7)], config)
    finally:
        tf.debugging.disable_check_numerics()
