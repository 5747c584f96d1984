"""The methods of distributed optimizers of Keras 2."""

import copy
from typing import Any

import tensorflow as tf

from horovod_powersgd.tensorflow.keras.distributed import DistributedMethods, distribute


class Keras2Methods(DistributedMethods):
    """DistributedMethods, and those by which gradients come to an optimizer of Keras 2."""

    @tf.autograph.experimental.do_not_convert
    def aggregate_gradients(self, grads_and_vars):
        """[(averaged gradient, variable)]"""
        pairs = list(grads_and_vars)
        if self._aggregation.exchanged or self._aggregation.applying or not pairs:
            return pairs
        gradients, variables = zip(*pairs)
        return list(zip(self._aggregate(gradients, variables), variables))

    def _aggregate_gradients(self, grads_and_vars):
        return self.aggregate_gradients(grads_and_vars)

    def compute_gradients(self, loss, var_list, tape=None):
        return self._compute_gradients(loss, var_list, tape=tape)

    @tf.autograph.experimental.do_not_convert
    def _compute_gradients(self, loss, var_list, grad_loss=None, tape=None):
        base: Any = super(DistributedMethods, self)
        if hasattr(base, "compute_gradients"):
            pairs = base.compute_gradients(loss, var_list, tape)
        else:
            pairs = base._compute_gradients(loss, var_list, grad_loss, tape)
        if self._aggregation.inside_loss_scaling:
            return pairs
        pairs = self.aggregate_gradients(pairs)
        self._aggregation.exchanged = True
        return pairs

    @tf.autograph.experimental.do_not_convert
    def get_gradients(self, loss, params):
        """The averaged gradients."""
        return self._allreduce(super().get_gradients(loss, params), params)

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """As the wrapped optimizer's, of the averaged gradients."""
        aggregation, pairs = self._aggregation, list(grads_and_vars)
        if kwargs.get("experimental_aggregate_gradients", True) and not kwargs.get("skip_gradients_aggregation"):
            pairs = self.aggregate_gradients(pairs)

        def apply():
            aggregation.applied = [variable for gradient, variable in pairs if gradient is not None]
            return super(Keras2Methods, self).apply_gradients(pairs, *args, **kwargs)

        return apply() if aggregation.applying else aggregation.apply(apply, self.iterations)

    def _transform_gradients(self, grads_and_vars):
        """Where tf.keras.optimizers.legacy clips."""
        clipped = super()._transform_gradients(grads_and_vars)
        if clipped is not grads_and_vars:
            averages, gradients = ([gradient for gradient, _ in pairs] for pairs in (grads_and_vars, clipped))
            self._aggregation.follow_clipping(averages, gradients)
        return clipped

    def __deepcopy__(self, memo):
        """The copy is distributed, too, with a memory of its own."""
        base = super()
        if not hasattr(base, "__deepcopy__"):
            raise TypeError("Keras 2 cannot copy its optimizers: wrap optimizer.from_config(optimizer.get_config())")
        return distribute(base.__deepcopy__(memo), copy.deepcopy(self._aggregation, memo), Keras2Methods)
