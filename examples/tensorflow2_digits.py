"""Handwritten digits with TensorFlow 2 and Horovod: a small convolutional network on scikit-learn's digits.

    horovodrun -np 2 python examples/tensorflow2_digits.py --compression powersgd --rank 4
"""

import argparse
import json
import statistics
import time

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorflow import keras

import horovod_powersgd.tensorflow as hvd


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


def share(count, epoch, seed):
    """The images of this worker in an epoch. Every worker has as many; so some can be in two workers' shares."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return np.resize(order, -(-count // hvd.size()) * hvd.size())[hvd.rank() :: hvd.size()]


def accuracy(model, images, labels):
    """The part of all workers' test images that is recognised."""
    mine = slice(hvd.rank(), None, hvd.size())
    right = np.argmax(model(images[mine]), 1) == labels[mine]
    right, all_images = hvd.allreduce(tf.constant([right.sum(), len(right)], tf.float32), name="accuracy", op=hvd.Sum)
    return float(right / all_images)


def bytes_per_step(model, compression):
    """What this worker hands to allreduce in a step."""
    if compression == "powersgd":
        stats = hvd.compression_stats(model.trainable_variables)
        return stats.bytes_sent, stats.ratio
    return model.count_params() * (2 if compression == "fp16" else 4), 2.0 if compression == "fp16" else 1.0


def main():
    args = parse_arguments()
    hvd.init()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    keras.utils.set_random_seed(args.seed)

    (train_images, train_labels), test = digits()
    model = network()
    # As many workers, as many times larger a batch: so is the learning rate.
    optimizer = keras.optimizers.SGD(args.lr * hvd.size(), momentum=0.9)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16, "powersgd": hvd.PowerSGD(rank=args.rank)}

    @tf.function(reduce_retracing=True)
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, model(images, training=True))
        tape = hvd.DistributedGradientTape(tape, compression=compression[args.compression])
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    batch_ms = []
    for epoch in range(args.epochs):
        mine = share(len(train_labels), epoch, args.seed)
        batches = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
        for batch in batches:
            start = time.perf_counter()
            loss = train_step(train_images[batch], train_labels[batch])
            if not batch_ms:  # Now the optimizer has its variables, too.
                hvd.broadcast_variables(model.variables, root_rank=0)
                hvd.broadcast_variables(optimizer.variables, root_rank=0)
            batch_ms.append((time.perf_counter() - start) * 1000)
        test_accuracy = accuracy(model, *test)
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1:3}  loss {float(loss):.4f}  test accuracy {test_accuracy:.4f}", flush=True)

    if hvd.rank() == 0:
        sent, ratio = bytes_per_step(model, args.compression)
        result = {
            "compression": args.compression,
            "rank": args.rank if args.compression == "powersgd" else None,
            "test_accuracy": test_accuracy,
            "bytes_per_epoch": sent * len(batches),
            "ratio": ratio,
            "ms_per_batch": statistics.median(batch_ms),
        }
        print(json.dumps(result))
        if args.results:
            with open(args.results, "w") as file:
                json.dump(result, file)


if __name__ == "__main__":
    main()
