"""An elastic job of three workers: one kills itself, the others go on and ask for a new one, and all three finish.

    tensorflow_elastic_training.py FOLDER tape|fit

Each worker writes what it saw to FOLDER/<process>.jsonl. FOLDER/grow appears when the new worker is to come.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow import keras

import choices
import horovod_powersgd.tensorflow as hvd
import horovod_powersgd.tensorflow.elastic as elastic
import horovod_powersgd.tensorflow.keras.elastic as keras_elastic
from horovod_powersgd.choosing import Choice
from horovod_powersgd.tensorflow.replicas import assert_replicas_equal, optimizer_variables
from horovod_powersgd.tensorflow.training import known_states

FOLDER, KIND = Path(sys.argv[1]), sys.argv[2]
BATCHES, EPOCHS, DIES_AT = 6, 4, 8


def report(**seen):
    with open(FOLDER / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(seen) + "\n")


hvd.init()
keras.utils.set_random_seed(hvd.rank())
model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(12, activation="tanh"), keras.layers.Dense(8)])
optimizer = keras.optimizers.Adam(0.01)
if KIND == "fit":
    # P and Q in turn, of one rank or the other: workers that come have to learn which it is.
    low, high = (hvd.PowerSGD(rank=rank, num_iters_per_step=1, wire_dtype="int8") for rank in (2, 1))
    optimizer = hvd.DistributedOptimizer(optimizer, compression=hvd.Accordion(low, high, interval=5))
model.compile(optimizer, "mse")
numbers = np.random.default_rng(hvd.rank()).standard_normal((8 * BATCHES, 18)).astype("float32")
x, y = numbers[:, :10], numbers[:, 10:]


def variables():
    return [*model.variables, *optimizer_variables(model.optimizer)]


def summary():
    content = b"".join(np.array(variable).tobytes() for variable in variables())
    memories = [state.memory for state in known_states(model.trainable_variables) if state.memory is not None]
    state = hvd.compression_state_dict(model.trainable_variables)["tensors"] if memories else {}
    shared = [tensor["regime"]["decisions"] for tensor in state.values() if "regime" in tensor]
    return {
        "decisions": shared,
        "size": hvd.size(),
        "variables": hashlib.sha256(content).hexdigest(),
        "memory": [float(tf.norm(memory)) for memory in memories],
    }


def after_batch(state):
    state.step += 1
    report(event="step", step=state.step, **summary())
    if state.step == DIES_AT and hvd.rank() == hvd.size() - 1 and not (FOLDER / "died").exists():
        (FOLDER / "died").touch()
        report(event="dies")
        os._exit(1)
    if state.step == DIES_AT + 4 and hvd.rank() == 0:
        (FOLDER / "grow").touch()
    state.commit()
    # The new worker comes while these wait.
    while DIES_AT + 4 <= state.step and hvd.size() < 3:
        time.sleep(0.3)
        state.check_host_updates()


class AfterBatch(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        after_batch(state)


# Workers that come have to learn the basis, and that it has been chosen.
in_a_basis = hvd.Auto(hvd.GradiVeq(slice_size=8, dimensions=2, learning_steps=2, compressed_steps=30))


@tf.function
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    tape = hvd.DistributedGradientTape(tape, compression=in_a_basis)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))


@elastic.run
def train_with_tape(state):
    begin(state)
    while state.step < BATCHES * EPOCHS:
        rows = slice(8 * (state.step % BATCHES), 8 * (state.step % BATCHES + 1))
        train_step(x[rows], y[rows])
        after_batch(state)


@keras_elastic.run
def train_with_fit(state):
    begin(state)
    used = [keras_elastic.UpdateBatchStateCallback(state), keras_elastic.UpdateEpochStateCallback(state), AfterBatch()]
    model.fit(x, y, batch_size=8, epochs=EPOCHS - state.epoch, callbacks=used, verbose=0)


def begin(state):
    assert_replicas_equal(variables())
    report(event="start", step=state.step, **summary())


if KIND == "tape":
    model.optimizer.build(model.trainable_variables)
    state = elastic.TensorFlowState(variables(), step=0)
    with choices.choosing(Choice(0)):
        train_with_tape(state)
else:
    state = keras_elastic.KerasState(model, step=0, batch=0, epoch=0)
    train_with_fit(state)
    assert (state.epoch, state.batch) == (EPOCHS, 0)
assert_replicas_equal(variables())
stats = hvd.compression_stats(model.trainable_variables)
report(event="end", step=state.step, exchanged=stats.steps, **summary())
