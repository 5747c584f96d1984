"""What a distributed Keras optimizer does with gradients before it applies them."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet

from horovod_powersgd.compressors.accordion import Accordion
from horovod_powersgd.tensorflow.clipping import clipping_factors
from horovod_powersgd.tensorflow.local_variables import LocalVariables
from horovod_powersgd.tensorflow.reduction import Reduction
from horovod_powersgd.tensorflow.training import Training
from horovod_powersgd.tensorflow.variable import make_variable, native


class Aggregation:
    """Sums gradients over backward passes, and averages the sums over the workers.

    Args:
        reduction: averages.
        passes: backward passes per step.
        average: over the passes, too.
        process_set: of the workers.
        scale_local: divide the gradients of this worker's own variables by the number of workers.

    Attributes:
        counter: variable: passes since the last step.
        passes: backward passes per step.
        exchanged: whether the gradients that are going to be applied have been averaged. Known when the ops are made.
        applying: whether averages are being applied: whatever the optimizer calls then is not to average again.
        inside_loss_scaling: whether a LossScaleOptimizer is computing gradients, which are not to be averaged yet.
        process_set: of the workers.
        local: this worker's own variables.
        variables: those of the last call.
        applied: those whose averages are being applied.
        saved_states: to be loaded when the variables are known.
    """

    def __init__(
        self, reduction: Reduction, passes: int, average: bool, process_set: ProcessSet, scale_local: bool
    ):
        self.reduction, self.passes, self._average = reduction, passes, average
        self.process_set, self._scale_local = process_set, scale_local
        self.counter = make_variable(np.int32(0))
        self.exchanged = self.applying = self.inside_loss_scaling = False
        self.variables: Sequence = ()
        self.applied: Sequence = ()
        self.saved_states: object = None
        self.local = LocalVariables()
        self._sums: dict = {}

    def __deepcopy__(self, memo) -> "Aggregation":
        """One for another optimizer, which has summed and exchanged nothing yet."""
        reduction = copy.copy(self.reduction)
        reduction.training, reduction.exchange = Training(), None
        twin = Aggregation(reduction, self.passes, self._average, self.process_set, self._scale_local)
        twin.local.update(self.local)
        return twin

    @tf.autograph.experimental.do_not_convert
    def __call__(self, gradients: Sequence, variables: Sequence, learning_rate=None) -> list:
        """The averages, in the step's last pass; the gradients, in the others, which are not to be applied.

        Args:
            gradients: this pass's.
            variables: theirs.
            learning_rate: gives it, for Accordion; None where there is none.
        """
        self.variables = variables = list(variables)
        if self.saved_states is not None:
            states, self.saved_states = self.saved_states, None
            with tf.init_scope():
                self.load(states)
        rate = learning_rate() if isinstance(self.reduction.compressor, Accordion) and learning_rate else None
        if self.passes == 1:
            return self._reduce(gradients, self.variables, rate)
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        dense = [tf.convert_to_tensor(gradients[i]) for i in places]
        present = [variables[i] for i in places]
        sums = [self._sum(gradient, variable) for gradient, variable in zip(dense, present)]
        added = [total.assign_add(gradient) for total, gradient in zip(sums, dense)]
        with tf.control_dependencies([*added, self.counter.assign_add(1)]):
            last = tf.equal(self.counter, self.passes)

        def finish():
            totals = [total / self.passes if self._average else tf.convert_to_tensor(total) for total in sums]
            means = self._reduce(totals, present, rate)
            with tf.control_dependencies(means):
                cleared = [total.assign(tf.zeros_like(total)) for total in sums] + [self.counter.assign(0)]
            with tf.control_dependencies(cleared):
                return [tf.identity(mean) for mean in means]

        found = dict(zip(places, tf.nest.flatten(tf.cond(last, finish, lambda: dense))))
        return [found.get(i) for i in range(len(gradients))]

    def apply(self, apply: Callable, iterations: tf.Variable):
        """Calls `apply` after a step's last pass; after the others only the iterations are counted."""
        self.applying = True
        try:
            return apply() if self.passes == 1 else self._apply_in_last_pass(apply, iterations)
        finally:
            self.applying = self.exchanged = False

    def _apply_in_last_pass(self, apply: Callable, iterations: tf.Variable):
        def done(operation):
            # Keras 3 returns None.
            with tf.control_dependencies([] if operation is None else [operation]):
                return tf.constant(True)

        applied = tf.cond(
            tf.equal(self.counter, 0), lambda: done(apply()), lambda: done(iterations.assign_add(1))
        )
        return iterations if tf.executing_eagerly() else applied.op

    def follow_clipping(self, averages: Sequence, clipped: Sequence) -> None:
        """Lets the memories follow what the optimizer does to averages, those of the variables being applied."""
        if self.reduction.compressor is not None:
            self.reduction.follow_clipping(self.applied, clipping_factors(averages, clipped))

    def load(self, states) -> None:
        """hvd.load_compression_state_dict, of the variables of the last call."""
        self.reduction.load_state_dict(states, self.variables)

    def _reduce(self, gradients: Sequence, variables: Sequence, learning_rate) -> list:
        return self.reduction.of_shared(
            gradients, variables, self.local.references(), self._scale_local, learning_rate=learning_rate
        )

    def _sum(self, gradient: tf.Tensor, variable) -> tf.Variable:
        key = native(variable).ref()
        if key not in self._sums:
            with tf.device(native(variable).device):
                self._sums[key] = make_variable(np.zeros(variable.shape, gradient.dtype.as_numpy_dtype))
        return self._sums[key]
