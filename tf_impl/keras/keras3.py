"""The methods of distributed optimizers of Keras 3."""

import copy

import tensorflow as tf

from horovod_powersgd.tensorflow.keras.distributed import DistributedMethods, distribute


class Keras3Methods(DistributedMethods):
    """DistributedMethods, and those by which gradients come to an optimizer of Keras 3."""

    built: bool

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads, trainable_variables=None):
        """As the wrapped optimizer's, of the averaged gradients."""
        if trainable_variables is None and not self.built:
            return super().apply(grads)  # which says what is missing
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        self._apply_averages(
            grads, variables, lambda averages: super(Keras3Methods, self).apply(averages, variables)
        )

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, grads_and_vars):
        """As the wrapped optimizer's, of the averaged gradients."""
        gradients, variables = zip(*grads_and_vars)
        self._apply_averages(
            gradients,
            variables,
            lambda averages: super(Keras3Methods, self).apply_gradients(list(zip(averages, variables))),
        )
        return self._iterations

    def _apply_averages(self, gradients, variables, apply):
        aggregation = self._aggregation
        if aggregation.applying:
            apply(list(gradients))
            return
        if not self.built:
            self.build(list(variables))
            self.built = True
        averages = list(gradients) if aggregation.exchanged else self._aggregate(gradients, variables)
        aggregation.apply(lambda: apply(averages), self._iterations)

    def _backend_apply_gradients(self, grads, trainable_variables):
        self._aggregation.applied = trainable_variables
        super()._backend_apply_gradients(grads, trainable_variables)

    def __reduce__(self):
        """In a pickle it is a plain one, as in saved models."""
        _, contents = super().__reduce__()
        return self._wrapped._unpickle_model, contents

    def __deepcopy__(self, memo):
        """What Keras makes of a copy, distributed, with a memory of its own."""
        rebuild, arguments = self.__reduce__()
        return distribute(rebuild(*arguments), copy.deepcopy(self._aggregation, memo), Keras3Methods)

    def __copy__(self):
        return copy.deepcopy(self)
