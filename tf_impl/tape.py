"""hvd.DistributedGradientTape that takes a compressor."""

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from horovod_powersgd.arguments import refuse_misplaced
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.tensorflow.clipping import clipping_factors
from horovod_powersgd.tensorflow.local_variables import LocalVariables
from horovod_powersgd.tensorflow.reduction import Reduction, native_groups, scaled, unscaled
from horovod_powersgd.tensorflow.training import TAPES
from horovod_powersgd.tensorflow.variable import native

# In horovod.tensorflow, activate() puts the one below there.
_horovods_tape = horovod.DistributedGradientTape


class _DistributedGradientTape(horovod._DistributedGradientTape):
    """Horovod's tape, of any variables and compression.

    Attributes:
        loss_scale: what the loss is multiplied by, a number or a variable: the memory is kept without it, and so
            stays right when the scale changes. None: nothing.
        learning_rate: of the step, for Accordion: a number, a tensor or a variable. None: not known.
        discardable: whether discard() is going to be called, perhaps. It costs memory of the gradients' size, and a
            copy in each step.
    """

    # Horovod's methods say super(self.__class__, self), so the class of a tape is made, as Horovod makes its own, by
    # putting these methods and Horovod's into a direct subclass of the wrapped tape's class.
    loss_scale = learning_rate = None
    discardable = False
    _last_sources: Sequence = ()

    def __enter__(self):
        self._allreduce_grads.begin()
        return super(self.__class__, self).__enter__()

    def register_local_source(self, source) -> None:
        """The source's gradient stays this worker's own."""
        self._local_sources.add(source)

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self,
        target,
        sources,
        output_gradients=None,
        use_generic_names=False,
        unconnected_gradients=tf.UnconnectedGradients.NONE,
    ) -> Any:
        """The averaged gradients, in the structure of `sources`.

        Args:
            target, sources, output_gradients, unconnected_gradients: as tf.GradientTape's.
            use_generic_names: as Horovod's.
        """
        flat = tf.nest.flatten(sources)
        variables = [native(source) for source in flat]
        self._last_sources, self._allreduce_grads.discardable = flat, self.discardable
        gradients = super(self.__class__, self).gradient(target, variables, output_gradients, unconnected_gradients)
        gradients = self._allreduce_grads.of_shared(
            unscaled(gradients, self.loss_scale),
            flat,
            self._local_sources.references(),
            self.scale_local_gradients,
            use_generic_names,
            self.learning_rate,
        )
        return tf.nest.pack_sequence_as(sources, scaled(gradients, self.loss_scale))

    def jacobian(self, *args, **kwargs) -> Any:
        """Not for a distributed tape, whose gradients are averages.

        Raises:
            RuntimeError: always, with what to do.
        """
        raise RuntimeError(
            "A Jacobian is each worker's own, and a distributed tape averages. Take it from the tf.GradientTape that "
            "you wrap: inner = tf.GradientTape(persistent=True), then inner.jacobian(...) beside "
            "hvd.DistributedGradientTape(inner, ...).gradient(...); and hvd.allreduce it if you want the average"
        )

    batch_jacobian = jacobian

    def get_local_and_global_gradients(self, target, sources, output_gradients=None, use_generic_names=False):
        """([(source, gradient)] of the local sources, [(source, gradient)] of the others)."""
        gradients = self.gradient(target, sources, output_gradients, use_generic_names)
        local, pairs = self._local_sources.references(), list(zip(sources, gradients))
        return (
            [pair for pair in pairs if native(pair[0]).ref() in local],
            [pair for pair in pairs if native(pair[0]).ref() not in local],
        )

    @tf.autograph.experimental.do_not_convert
    def discard(self) -> None:
        """Lets the step leave no trace, where its gradients are not applied: memory, what the compressor keeps and the
        number of steps are what they were before this tape's gradient(). All workers call it, or none.

        Raises:
            RuntimeError: `discardable` was not set before gradient() was called.
        """
        if not self._allreduce_grads.discardable:
            raise RuntimeError("set tape.discardable = True before gradient(), so that the step can be discarded")
        self._allreduce_grads.discard()

    @tf.autograph.experimental.do_not_convert
    def clip_by_global_norm(self, gradients, clip_norm) -> Any:
        """tf.clip_by_global_norm of what gradient() returned last, which lets the memory know: else what it cuts off a
        bad batch's gradients would come back from there, in many steps.

        Args:
            gradients: in the structure of gradient()'s sources.
            clip_norm: a number or a scalar tensor.

        Returns:
            (clipped, norm): the gradients, in their structure, and their global norm before.

        Raises:
            ValueError: there are not as many gradients as sources.
        """
        flat = tf.nest.flatten(gradients)
        norm = tf.linalg.global_norm(flat)
        limit = tf.cast(clip_norm, norm.dtype)
        factor = tf.where(tf.math.is_finite(norm), limit / tf.maximum(norm, limit), norm)
        self._let_memory_know([factor] * len(flat))
        return tf.nest.pack_sequence_as(gradients, tf.clip_by_global_norm(flat, clip_norm, norm)[0]), norm

    @tf.autograph.experimental.do_not_convert
    def follow_clipping(self, gradients, clipped) -> None:
        """Lets the memory know of clipping of another kind, as clip_by_global_norm does.

        Args:
            gradients: what gradient() returned last.
            clipped: the same, clipped: by tf.clip_by_value, tf.clip_by_norm and so on.

        Raises:
            ValueError: there are not as many as sources.
        """
        self._let_memory_know(clipping_factors(tf.nest.flatten(gradients), tf.nest.flatten(clipped)))

    def _let_memory_know(self, factors):
        if len(factors) != len(self._last_sources):
            raise ValueError(
                f"clipping needs what gradient() returned last, {len(self._last_sources)} gradients, not {len(factors)}"
            )
        self._allreduce_grads.follow_clipping(self._last_sources, factors)

    def compression_stats(self) -> CompressionStats:
        """What compression did to the gradients of the last gradient() call, in the last step and in all steps."""
        if self._allreduce_grads.exchange is None:
            raise RuntimeError("this tape has compressed nothing: give it a compressor, and call gradient() first")
        return self._allreduce_grads.exchange.stats()


@tf.autograph.experimental.do_not_convert
def DistributedGradientTape(
    gradtape,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    op=horovod.Average,
    gradient_predivide_factor=1.0,
    num_groups=0,
    groups=None,
    process_set=horovod.global_process_set,
    scale_local_gradients=True,
) -> Any:
    """horovod.tensorflow.DistributedGradientTape, whose compression can also be a compressor.

    What that keeps from step to step belongs to the variables: a tape may be built anew in each step, and goes on with
    their training until hvd.forget_compression(variables) is called.

    Args:
        gradtape: a tf.GradientTape to wrap. The result is an instance of its class.
        compression: a compressor such as PowerSGD, a generator function, or Compression.none or .fp16.
        (the others): as Horovod's.

    Raises:
        TypeError: a compressor in another argument's place.
        ValueError: a compressor with op=Adasum, or what Horovod refuses.

    Example:
        >>> with tf.GradientTape() as tape:
        ...     loss = ...
        >>> tape = hvd.DistributedGradientTape(tape, compression=hvd.PowerSGD(rank=4))
        >>> gradients = tape.gradient(loss, model.trainable_variables)
    """
    refuse_misplaced(locals())
    groups = native_groups(groups)
    arguments = (sparse_as_dense, op, gradient_predivide_factor)
    # Horovod checks the arguments.
    tape = _horovods_tape(
        gradtape,
        device_dense,
        device_sparse,
        horovod.Compression.none,
        *arguments,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    methods = {**vars(horovod._DistributedGradientTape), **vars(_DistributedGradientTape)}
    tape.__class__ = type(gradtape.__class__.__name__, (gradtape.__class__,), methods)
    tape._local_sources = LocalVariables()
    groups = num_groups if num_groups and groups is None else groups
    tape._allreduce_grads = Reduction(
        compression, "DistributedGradientTape", device_dense, device_sparse, *arguments, groups, process_set, TAPES
    )
    return tape


@tf.autograph.experimental.do_not_convert
def PartialDistributedGradientTape(
    gradtape,
    device_dense="",
    device_sparse="",
    compression=horovod.Compression.none,
    sparse_as_dense=False,
    op=horovod.Average,
    gradient_predivide_factor=1.0,
    num_groups=0,
    groups=None,
    process_set=horovod.global_process_set,
    local_layers=None,
    scale_local_gradients=True,
) -> Any:
    """DistributedGradientTape that leaves the gradients of some layers to each worker.

    Args:
        local_layers: a Keras layer or a list of them, built or not.
        (the others): as DistributedGradientTape's.

    Raises:
        ValueError: what is in local_layers is no layer; and as DistributedGradientTape.
    """
    refuse_misplaced(locals())
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    tape._local_sources.add_layers(local_layers)
    return tape
