"""horovod.tensorflow.keras.elastic for Keras 3 and Keras 2 (tf_keras)."""

from horovod.tensorflow.keras.elastic import CommitStateCallback, UpdateEpochStateCallback
from tensorflow import keras

from horovod_powersgd.tensorflow.elastic import TensorFlowKerasState, run

__all__ = ["CommitStateCallback", "KerasState", "UpdateBatchStateCallback", "UpdateEpochStateCallback", "run"]


class KerasState(TensorFlowKerasState):
    """The state of a Keras model and its optimizer.

    Args:
        model: it must be built.
        optimizer: model.optimizer if None. It is built if it is not.
        kwargs: attributes of the state, saved and synchronized too.

    Raises:
        ValueError: the model is not built.
    """

    def __init__(self, model, optimizer=None, **kwargs) -> None:
        super().__init__(model, optimizer, **kwargs)


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps in state.batch the number of the epoch's batch that was trained last; 0 when an epoch begins.

    Keras begins the epoch that a change of workers interrupted anew, with batches numbered from 0. Where it knows how
    many batches an epoch has, this callback ends that epoch after those that were left of it.

    Args:
        state: has a batch.
    """

    def __init__(self, state) -> None:
        super().__init__()
        self.state = state
        self._first = 0

    def on_train_begin(self, logs=None):
        self._first = self.state.batch

    def on_batch_end(self, batch, logs=None):
        self.state.batch = self._first + batch
        steps = self.params.get("steps")
        if self._first and steps and self.state.batch + 1 >= steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.state.batch = 0
        if self._first:
            self._first = 0
            self.model.stop_training = False
