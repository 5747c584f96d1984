"""The exchanges that there are: the same variables meet the same one in every step."""

from collections.abc import Sequence

import tensorflow as tf

from horovod_powersgd.tensorflow.auto_exchange import AutoExchange
from horovod_powersgd.tensorflow.auto_state import AutoState
from horovod_powersgd.tensorflow.exchange import Exchange, Tensor
from horovod_powersgd.tensorflow.settings import Settings
from horovod_powersgd.tensorflow.training import Training, states_of
from horovod_powersgd.tensorflow.variable import native


def exchange_of(
    settings: Settings, training: Training, variables: Sequence, gradients: Sequence[Tensor]
) -> Exchange:
    """The exchange of these variables, the same as in the last step where they are.

    Args:
        settings: how to exchange.
        training: whose step it is.
        variables: tf.Variable or Keras 3's, each once.
        gradients: theirs; which of them are sparse must not change.
    """
    states = states_of(variables, settings.config, settings.process_set, training)
    sparse = tuple(isinstance(gradient, tf.IndexedSlices) for gradient in gradients)
    groups: object = settings.groups
    if isinstance(settings.groups, tuple):
        places = {id(native(variable)): i for i, variable in enumerate(variables)}
        groups = [[places[identity] for identity in group if identity in places] for group in settings.groups]
    key = (settings, tuple(id(state) for state in states), sparse)
    exchanges = states[0].counters.exchanges
    if key not in exchanges:
        auto = [state for state in states if isinstance(state, AutoState)]
        exchanges[key] = (
            AutoExchange(settings, auto, groups, sparse) if auto else Exchange(settings, states, groups, sparse)
        )
    return exchanges[key]
