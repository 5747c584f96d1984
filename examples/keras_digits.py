"""Handwritten digits with Keras and Horovod: a small convolutional network on scikit-learn's digits.

    horovodrun -np 2 python examples/keras_digits.py --compression powersgd --rank 4

For Keras 3, and with TF_USE_LEGACY_KERAS=1 for Keras 2.
"""

import argparse
import json
import math
import statistics
import time

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorflow import keras

import horovod_powersgd.tensorflow.keras as hvd


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", choices=["none", "fp16", "powersgd"], default="powersgd")
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD's factors")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="of each worker")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of one worker")
    parser.add_argument("--results", metavar="FILE", help="write the result there, as JSON")
    return parser.parse_args()


def digits():
    """1347 training and 450 test images of 8 x 8 pixels, between 0 and 1, with their labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
    train, test = train_test_split(range(len(labels)), test_size=450, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPool2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def share(count):
    """This worker's part of the training images. Every worker has as many; so some can be in two workers' shares."""
    return np.resize(np.arange(count), -(-count // hvd.size()) * hvd.size())[hvd.rank() :: hvd.size()]


class Stopwatch(keras.callbacks.Callback):
    """The milliseconds of each batch."""

    def on_train_begin(self, logs=None):
        self.batch_ms = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.batch_ms.append((time.perf_counter() - self.start) * 1000)


def accuracy(model, images, labels):
    """The part of all workers' test images that is recognised."""
    mine = slice(hvd.rank(), None, hvd.size())
    right = model.predict(images[mine], verbose=0).argmax(1) == labels[mine]
    return float(np.mean(hvd.allgather(right, name="accuracy")))


def bytes_per_step(model, compression):
    """What this worker hands to allreduce in a step."""
    if compression == "powersgd":
        stats = model.optimizer.compression_stats()
        return stats.bytes_sent, stats.ratio
    return model.count_params() * (2 if compression == "fp16" else 4), 2.0 if compression == "fp16" else 1.0


def main():
    args = parse_arguments()
    hvd.init()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    keras.utils.set_random_seed(args.seed)

    (train_images, train_labels), test = digits()
    mine = share(len(train_labels))

    model = network()
    # As many workers, as many times larger a batch: so is the learning rate.
    rate = args.lr * hvd.size()
    compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16, "powersgd": hvd.PowerSGD(rank=args.rank)}
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(rate, momentum=0.9), compression=compression[args.compression]
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    stopwatch = Stopwatch()
    callbacks = [
        stopwatch,
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(rate, warmup_epochs=3),
    ]
    if args.compression == "powersgd":
        callbacks.append(hvd.callbacks.CompressionCallback())
    model.fit(
        train_images[mine],
        train_labels[mine],
        batch_size=args.batch_size,
        epochs=args.epochs,
        callbacks=callbacks,
        verbose=2 if hvd.rank() == 0 else 0,
    )
    test_accuracy = accuracy(model, *test)

    if hvd.rank() == 0:
        sent, ratio = bytes_per_step(model, args.compression)
        result = {
            "compression": args.compression,
            "rank": args.rank if args.compression == "powersgd" else None,
            "test_accuracy": test_accuracy,
            "bytes_per_epoch": sent * math.ceil(len(mine) / args.batch_size),
            "ratio": ratio,
            "ms_per_batch": statistics.median(stopwatch.batch_ms),
        }
        print(json.dumps(result))
        if args.results:
            with open(args.results, "w") as file:
                json.dump(result, file)


if __name__ == "__main__":
    main()
