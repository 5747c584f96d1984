"""horovod.tensorflow.keras.callbacks, for Keras 3 and Keras 2 (tf_keras), and one that logs what compression did."""

import numbers

import tensorflow as tf
from horovod.tensorflow.functions import allgather_object
from horovod.tensorflow.mpi_ops import rank, size
from tensorflow import keras

from horovod_powersgd.tensorflow.keras_version import KERAS_3
from horovod_powersgd.tensorflow.replicas import broadcast_variables, optimizer_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all workers the root's variables after the first batch: the model's and the optimizer's.

    Not the states of random layers: workers that were seeded differently go on drawing different numbers.

    Args:
        root_rank: the worker that has the right ones.
        device: where to broadcast.
        local_variables: a variable, or several, of which each worker keeps its own value.

    Raises:
        ValueError: something in local_variables is no variable.
    """

    def __init__(self, root_rank, device="", local_variables=None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._local: list = []
        if hasattr(local_variables, "assign"):
            local_variables = [local_variables]
        for variable in local_variables or ():
            self.register_local_var(variable)

    def register_local_var(self, var) -> None:
        """Lets each worker keep its own value of a variable."""
        if not hasattr(var, "assign"):
            raise ValueError(f"local variables must be variables; {var!r} is none")
        self._local.append(var)

    def on_batch_end(self, batch, logs=None):
        if self.broadcast_done:
            return
        local = {id(variable) for variable in self._local}
        # In Keras 3, model.variables has the random states, too.
        variables = [*self.model.weights, *optimizer_variables(self.model.optimizer)]
        with tf.device(self.device):
            broadcast_variables([v for v in variables if id(v) not in local], self.root_rank)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the metrics over all workers at the end of each epoch.

    The callbacks that stand after it in the list see the averages: ReduceLROnPlateau, EarlyStopping, TensorBoard and
    the history, for example. What is no number is left as it is.

    Args:
        device: where to exchange them.

    Raises:
        ValueError: at the end of an epoch, on every worker, if the workers do not have the same metrics.
    """

    def __init__(self, device="") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        mine = {name: float(value) for name, value in sorted(logs.items()) if isinstance(value, numbers.Real)}
        with tf.device(self.device):
            everyone = allgather_object(mine, name="metrics")
        for worker, theirs in enumerate(everyone):
            if theirs.keys() != everyone[0].keys():
                raise ValueError(
                    f"The workers must have the same metrics to average: worker {worker} has {list(theirs)}, "
                    f"worker 0 has {list(everyone[0])}"
                )
        logs.update({name: sum(theirs[name] for theirs in everyone) / len(everyone) for name in mine})


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to initial_lr * multiplier(epoch), and logs it as lr at the end of each epoch.

    In the batch in which the rate changes from old to new, the optimizer's momentum is multiplied by new / old, because
    the velocity that it multiplies holds gradients times the old rate (Goyal et al., arXiv 1706.02677, section 3). With
    steps_per_execution above 1, where Keras calls callbacks once for several batches, the momentum stays what it is.

    Args:
        initial_lr: the rate for multiplier 1.
        multiplier: a function of the epoch; or a number, to be raised to the power of the epochs since start_epoch.
        start_epoch: the first epoch in which the rate is set.
        end_epoch: the first one in which it is no longer set; None for never.
        staircase: whether to set it in the first batch of each epoch. Otherwise it is set in every batch, and the epoch
            is a fraction.
        momentum_correction: whether to correct the momentum where the optimizer has one.
        steps_per_epoch: batches per epoch, needed without staircase where Keras does not know them.

    Raises:
        ValueError: initial_lr is None; or, when training begins, the optimizer's learning rate is a schedule, or
            steps_per_epoch is missing.
    """

    def __init__(
        self,
        initial_lr,
        multiplier,
        start_epoch=0,
        end_epoch=None,
        staircase=True,
        momentum_correction=True,
        steps_per_epoch=None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("initial_lr is required")
        self.initial_lr = initial_lr
        self.multiplier = multiplier if callable(multiplier) else lambda epoch: multiplier ** (epoch - start_epoch)
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = None
        self.restore_momentum = None

    def on_train_begin(self, logs=None):
        optimizer = self._optimizer
        # tf_keras's learning_rate is a variable even then.
        if not hasattr(getattr(optimizer, "_learning_rate", optimizer.learning_rate), "assign"):
            raise ValueError(
                f"{type(self).__name__} sets the learning rate, but that of {type(optimizer).__name__} is a schedule: "
                f"create the optimizer with a number"
            )
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(f"Keras does not know the steps per epoch: give {type(self).__name__} steps_per_epoch")
        momentum = getattr(optimizer, "momentum", None)
        if self.momentum_correction and isinstance(momentum, numbers.Real) and not hasattr(momentum, "assign"):
            optimizer.momentum = _Momentum(momentum)
            # An earlier fit may have compiled the float.
            self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch, logs=None):
        self.current_epoch = epoch

    def on_batch_begin(self, batch, logs=None):
        if self.current_epoch < self.start_epoch:
            return
        if self.end_epoch is not None and self.current_epoch >= self.end_epoch:
            return
        if not self.staircase:
            self._set_rate(self.current_epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set_rate(self.current_epoch)

    def on_batch_end(self, batch, logs=None):
        if self.restore_momentum is not None:
            self._optimizer.momentum.assign(self.restore_momentum)
            self.restore_momentum = None

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["lr"] = _value(self._optimizer.learning_rate)

    def _set_rate(self, epoch):
        optimizer = self._optimizer
        old, new = _value(optimizer.learning_rate), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate.assign(new)
        corrects = self.momentum_correction and _steps_per_execution(self.model) == 1
        if corrects and hasattr(optimizer, "momentum") and old:
            self.restore_momentum = _value(optimizer.momentum)
            optimizer.momentum.assign(self.restore_momentum * new / old)

    @property
    def _optimizer(self):
        return list(_layers(self.model.optimizer))[-1]


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate, batch by batch, from initial_lr / workers to initial_lr.

    In batch b of epoch e the rate is initial_lr / workers * (1 + (workers - 1) * t / warmup_epochs), where
    t = e + (b + 1) / steps_per_epoch.

    Args:
        initial_lr: the rate after the warmup.
        warmup_epochs: how long it lasts.
        momentum_correction: as in LearningRateScheduleCallback.
        steps_per_epoch: as there.
        verbose: 1 to print a line when the warmup ends.

    Raises:
        ValueError: as there.
    """

    def __init__(self, initial_lr, warmup_epochs=5, momentum_correction=True, steps_per_epoch=None, verbose=0) -> None:
        def multiplier(epoch):
            done = (epoch + 1 / self.steps_per_epoch) / warmup_epochs
            return (1 + (size() - 1) * done) / size()

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.verbose and epoch == self.end_epoch - 1 and rank() == 0:
            print(f"\nEpoch {epoch + 1}: warmed up to learning rate {_value(self._optimizer.learning_rate):g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Keras's ModelCheckpoint with save_best_only. Where to save is set later, as its attribute filepath.

    Args:
        monitor, verbose, save_weights_only, mode, save_freq: as ModelCheckpoint's.
    """

    def __init__(self, monitor="val_loss", verbose=0, save_weights_only=False, mode="auto", save_freq="epoch") -> None:
        super().__init__(
            # Keras 3 looks at how it ends.
            filepath=".weights.h5" if save_weights_only else ".keras",
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath = None


class CompressionCallback(keras.callbacks.Callback):
    """Logs, at the end of each epoch, what compression did in its last step.

    compression_bytes: handed to allreduce and allgather.
    compression_ratio: how many times fewer than without compression.
    compression_residual: the largest |e| / |delta| of a compressed tensor, which is left out where there is none.
    The history has them, and so has TensorBoard where it stands after this callback.

    Raises:
        TypeError: when training begins, if the model's optimizer does not compress.
    """

    def on_train_begin(self, logs=None):
        self._compressing_optimizer()

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        stats = self._compressing_optimizer().compression_stats()
        logs["compression_bytes"] = stats.bytes_sent
        logs["compression_ratio"] = stats.ratio
        residuals = [t.residual for t in stats.tensors if t.compressed and t.residual is not None]
        if residuals:
            logs["compression_residual"] = max(residuals)

    def _compressing_optimizer(self):
        for optimizer in _layers(self.model.optimizer):
            if hasattr(optimizer, "compression_stats"):
                return optimizer
        raise TypeError(
            f"CompressionCallback needs a model compiled with a DistributedOptimizer that compresses, "
            f"not with {type(self.model.optimizer).__name__}"
        )


class _Momentum(float):
    """A momentum that can be set while a model trains: compiled steps read its variable, a float is part of them.

    As a float, for comparisons and configurations, it is what it was at first.
    """

    dtype = "float32"  # which Keras 3 asks its operands for

    def __init__(self, value) -> None:
        self.variable = tf.Variable(value, trainable=False, dtype=self.dtype)
        self.assign = self.variable.assign

    def __tf_tensor__(self, dtype=None, name=None):
        value = self.variable.read_value()
        return value if dtype is None else tf.cast(value, dtype)

    def __reduce__(self):
        return float, (float(self),)


def _value(variable):
    return float(tf.convert_to_tensor(variable))


def _steps_per_execution(model):
    """How many batches a compiled model trains on between two calls of its callbacks."""
    # In Keras 2 it is a variable, which Keras may tune as it trains.
    return int(model.steps_per_execution if KERAS_3 else model._steps_per_execution)


def _layers(optimizer):
    """The optimizer, and, where it scales losses, the one in it."""
    yield optimizer
    if hasattr(optimizer, "inner_optimizer"):
        yield from _layers(optimizer.inner_optimizer)
