"""What hvd.Auto has chosen, in the variables that graphs read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.tensorflow.variable import make_variable

# What travels as it is: what a candidate leaves alone; small matrices, too; all gradients; those of middle size, and
# the small ones. Checkpoints have these numbers.
NOTHING_MORE, SMALL, ALL, MIDDLE = range(4)


class Chosen:
    """The choice for variables that are exchanged together, the same on every worker.

    Args:
        auto: the configuration.

    Attributes:
        candidate: int64 variable: the number of the candidate that was taken last.
        plain: int64 variable: what travels as it is: NOTHING_MORE, SMALL, MIDDLE or ALL.
        decider: the AutoExchange, of those that have variables in common, that has chosen; None where none has yet.
        decided: how many steps there had been when that one was last asked.
    """

    decider: Any = None
    decided = 0

    def __init__(self, auto: Auto):
        self._auto = auto
        self.candidate, self.plain = make_variable(np.int64(0)), make_variable(np.int64(ALL))

    def variables(self) -> dict[str, tf.Variable]:
        """All, by name."""
        return {"candidate": self.candidate, "plain": self.plain}

    def begin_again(self) -> None:
        """Forgets what was chosen."""
        self.candidate.assign(0)
        self.plain.assign(ALL)

    def state_dict(self) -> dict[str, object]:
        """What is saved beside the state of a candidate."""
        return {"chosen": self._auto.candidates[int(self.candidate)].description(), "plain": int(self.plain)}

    def take(self, description: Mapping) -> bool:
        """Takes the candidate that has this description; whether there is one."""
        number = self._auto.number_of(description)
        if number is not None:
            self.candidate.assign(number)
        return number is not None

    def load_state_dict(self, saved: Mapping) -> None:
        """Takes what was saved: with Auto, or with one of its candidates alone. What is none of the candidates is not
        chosen."""
        choice = saved.get("auto", {"chosen": saved["config"], "plain": NOTHING_MORE})
        self.plain.assign(choice["plain"] if self.take(choice["chosen"]) else ALL)
