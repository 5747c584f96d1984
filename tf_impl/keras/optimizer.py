"""hvd.DistributedOptimizer for Keras 3 and Keras 2 (tf_keras), that takes a compressor."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from horovod_powersgd.arguments import check_passes, check_predivide_factor, groups_of, refuse_misplaced
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.tensorflow.keras import loss_scaling
from horovod_powersgd.tensorflow.keras.aggregation import Aggregation
from horovod_powersgd.tensorflow.keras.eligibility import check_optimizer
from horovod_powersgd.tensorflow.keras.learning_rate import current_learning_rate
from horovod_powersgd.tensorflow.keras_version import KERAS_3
from horovod_powersgd.tensorflow.reduction import Reduction

# An object's real class, whatever a property of that name says.
_CLASS = vars(object)["__class__"]


# What comes after the mixins in the method resolution order is known when an optimizer is wrapped.
_Wrapped: Any = object


class _DistributedOptimizer(_Wrapped):
    """A mixin: in the method resolution order it comes before the class of the optimizer that is made distributed.

    Attributes:
        _wrapped: that class.
        _aggregation: the optimizer's own.
    """

    _wrapped: Any
    _aggregation: Aggregation

    @property
    def _agg_helper(self):
        """Horovod's name of what counts backward passes."""
        return self._aggregation if self._aggregation.passes > 1 else None

    @classmethod
    def from_config(cls, config, *args, **kwargs):
        """A plain optimizer, as saved models have it."""
        return cls._wrapped.from_config(config, *args, **kwargs)

    def register_local_var(self, var) -> None:
        """The variable's gradient stays this worker's own."""
        self._aggregation.local.add(var)

    def _allreduce(self, grads, vars):
        self._aggregation.exchanged = True
        return self._aggregate(grads, vars)

    def _aggregate(self, gradients, variables):
        return self._aggregation(gradients, variables, lambda: current_learning_rate(self))

    def _clip_gradients(self, grads):
        clipped = super()._clip_gradients(grads)
        if clipped is not grads:
            self._aggregation.follow_clipping(grads, clipped)
        return clipped

    def compute_gradients(self, loss, var_list, tape=None):
        """The averaged gradients, with their variables.

        Args:
            loss: a tensor computed under `tape`, or a function that computes it.
            var_list: variables.
            tape: where loss is a tensor.
        """
        if callable(loss):
            with tf.GradientTape() as tape:
                loss = loss()
        variables = list(var_list)
        return list(zip(self._allreduce(tape.gradient(loss, variables), variables), variables))

    def _compute_gradients(self, loss, var_list, grad_loss=None, tape=None):
        return self.compute_gradients(loss, var_list, tape)


class _CompressingOptimizer(_Wrapped):
    """The mixin that comes first in an optimizer that compresses."""

    _aggregation: Aggregation

    def compression_stats(self) -> CompressionStats:
        """What compression did in the last step and in all steps so far, for this worker.

        Raises:
            RuntimeError: nothing was compressed yet.
        """
        exchange = self._aggregation.reduction.exchange
        if exchange is None:
            raise RuntimeError("this optimizer has compressed nothing yet")
        return exchange.stats()

    def compression_state_dict(self) -> dict[str, object]:
        """What the compressor keeps, and this worker's memory: what a resumed run needs beside model and optimizer.

        Returns:
            Numbers, strings and numpy arrays, for pickle or numpy.save. Every worker saves its own.

        Raises:
            RuntimeError: nothing was compressed yet.
        """
        return self._aggregation.reduction.state_dict(self._aggregation.variables)

    def load_compression_state_dict(self, states: Mapping | Iterable[Mapping]) -> None:
        """Goes on where compression_state_dict was called; in the first step, where that is still to come.

        Args:
            states: what this worker saved; or what all workers saved, in the workers' order. Another number of
                workers than then needs all of them: the memories are shared out so that their mean stays.

        Raises:
            ValueError: another model or compressor, or states are missing. It names what differs.
        """
        aggregation = self._aggregation
        aggregation.variables = aggregation.variables or getattr(self, "_trainable_variables", ())
        if aggregation.variables:
            aggregation.load(states)
        else:
            aggregation.saved_states = states


class _Keras3Optimizer(_DistributedOptimizer):
    built: bool

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads, trainable_variables=None):
        """As the wrapped optimizer's, of the averaged gradients."""
        if trainable_variables is None and not self.built:
            return super().apply(grads)  # which says what is missing
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        self._apply_averages(
            grads, variables, lambda averages: super(_Keras3Optimizer, self).apply(averages, variables)
        )

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, grads_and_vars):
        """As the wrapped optimizer's, of the averaged gradients."""
        gradients, variables = zip(*grads_and_vars)
        self._apply_averages(
            gradients,
            variables,
            lambda averages: super(_Keras3Optimizer, self).apply_gradients(list(zip(averages, variables))),
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
        return _distribute(rebuild(*arguments), copy.deepcopy(self._aggregation, memo))

    def __copy__(self):
        return copy.deepcopy(self)


class _Keras2Optimizer(_DistributedOptimizer):
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
        base: Any = super(_DistributedOptimizer, self)
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
            return super(_Keras2Optimizer, self).apply_gradients(pairs, *args, **kwargs)

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
        return _distribute(base.__deepcopy__(memo), copy.deepcopy(self._aggregation, memo))


def DistributedOptimizer(
    optimizer,
    name=None,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    gradient_predivide_factor=1.0,
    op=horovod.Average,
    backward_passes_per_step=1,
    average_aggregated_gradients=False,
    num_groups=0,
    groups=None,
    process_set=horovod.global_process_set,
    scale_local_gradients=True,
) -> Any:
    """horovod.tensorflow.keras.DistributedOptimizer, for Keras 3 as well, whose compression can also be a compressor.

    Args:
        optimizer: to wrap. The result is this same object, made a distributed optimizer: whatever was set, built or
            learned stays. In a saved model it is an optimizer of its class, and loads without Horovod. One that is
            distributed already is wrapped anew, and begins with an empty memory.
        compression: a compressor such as PowerSGD, a generator function, or Compression.none or .fp16.
        (the others): as Horovod's.

    Raises:
        TypeError: it is no optimizer, or one of the Keras that tf.keras is not, or has a method set on the object
            itself that has to exchange; or compression is none.
        ValueError: what Horovod refuses.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), compression=hvd.PowerSGD(rank=4))
        >>> model.compile(optimizer=optimizer, loss=...)
    """
    refuse_misplaced(locals())
    check_optimizer(optimizer)
    check_predivide_factor(gradient_predivide_factor, op == horovod.Average, horovod.rocm_built())
    if op not in (horovod.Average, horovod.Sum):
        raise ValueError("op currently only supports Average and Sum")
    check_passes(backward_passes_per_step)
    groups = groups_of(num_groups, groups)
    if not (groups is None or isinstance(groups, list) or groups > 0):
        raise ValueError("groups should be a positive integer or a list of list of variables")
    reduction = Reduction(
        compression,
        name or f"Distributed{type(optimizer).__name__}",
        device_dense,
        device_sparse,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        groups,
        process_set,
    )
    aggregation = Aggregation(
        reduction,
        backward_passes_per_step,
        average_aggregated_gradients,
        process_set,
        scale_local_gradients,
    )
    if isinstance(optimizer, loss_scaling.loss_scale_optimizers()):
        _distribute(optimizer.inner_optimizer, aggregation)
        return _expose(optimizer)
    return _distribute(optimizer, aggregation)


def PartialDistributedOptimizer(
    optimizer,
    name=None,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    gradient_predivide_factor=1.0,
    op=horovod.Average,
    groups=None,
    process_set=horovod.global_process_set,
    local_layers=None,
    scale_local_gradients=True,
) -> Any:
    """horovod.keras.PartialDistributedOptimizer: DistributedOptimizer that leaves some layers to each worker.

    Args:
        local_layers: a Keras layer or a list of them, built or not.
        (the others): as DistributedOptimizer's.

    Raises:
        ValueError: what is in local_layers is no layer; and as DistributedOptimizer.
    """
    distributed = DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    aggregation = loss_scaling.aggregation_inside(distributed) or distributed._aggregation
    aggregation.local.add_layers(local_layers)
    return distributed


def load_model(
    filepath, custom_optimizers=None, custom_objects=None, compression=horovod.Compression.none, legacy_opts=False
) -> Any:
    """A saved Keras model, with its optimizer, as it was saved, made a distributed one.

    Args:
        filepath: as keras.models.load_model's.
        custom_optimizers: a list of optimizer classes that the model may have been saved with.
        custom_objects: as keras.models.load_model's.
        compression: as DistributedOptimizer's.
        legacy_opts: not needed; the saved model says which optimizer it has.
    """
    custom_objects = {**{cls.__name__: cls for cls in custom_optimizers or ()}, **(custom_objects or {})}
    model = tf.keras.models.load_model(filepath, custom_objects=custom_objects)
    # Custom objects may have made it one already.
    distributed = isinstance(getattr(model.optimizer, "inner_optimizer", model.optimizer), _DistributedOptimizer)
    if model.optimizer is not None and not distributed:
        DistributedOptimizer(model.optimizer, compression=compression)
        if KERAS_3:
            # Keras has compiled it when its optimizer was a plain one.
            model.jit_compile = False
    return model


def _expose(loss_scale_optimizer):
    """Gives it what users ask a distributed optimizer for."""
    inner = loss_scale_optimizer.inner_optimizer
    for name in ("compression_stats", "compression_state_dict", "load_compression_state_dict", "register_local_var"):
        if hasattr(inner, name):
            object.__setattr__(loss_scale_optimizer, name, getattr(inner, name))
    return loss_scale_optimizer


def _distribute(optimizer, aggregation):
    """Makes an optimizer a distributed one, of which all else stays: its state, its attributes, its configuration.

    Raises:
        TypeError: the optimizer itself, not its class, has a method that has to exchange.
    """
    wrapped = optimizer.__class__
    bases: tuple = (_Keras3Optimizer if KERAS_3 else _Keras2Optimizer, wrapped)
    if aggregation.reduction.compressor is not None:
        bases = (_CompressingOptimizer, *bases)
    hiding = sorted(vars(optimizer).keys() & (vars(_DistributedOptimizer).keys() | vars(bases[-2]).keys()))
    if hiding:
        names = " and ".join(hiding)
        raise TypeError(
            f"{names} of this {wrapped.__name__} was set on the object, and would be called in place of the one that "
            f"exchanges gradients. Define {names} in a subclass of {wrapped.__name__}."
        )
    members = {
        "_wrapped": wrapped,
        # Keras writes the class that an optimizer says it has into saved models: there it is the wrapped one.
        "__class__": property(lambda self: wrapped),
        # As Horovod's.
        "__module__": "horovod._keras",
        "__doc__": wrapped.__doc__,
    }
    # Keras tracks what is assigned to an optimizer, and would save it.
    object.__setattr__(optimizer, "_aggregation", aggregation)
    _CLASS.__set__(optimizer, type(wrapped.__name__, bases, members))
    return optimizer
