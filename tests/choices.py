"""What the checks of hvd.Auto share, whatever the framework: choices that are made for it, and what it is given."""

from unittest import mock

import numpy as np

import cases
from horovod_powersgd.choosing import Choice, Chooser

PLAIN = Choice()
# While it is entered, a try takes a few steps, none is made twice, and what was chosen is not compared before 50 more.
short_tries = mock.patch.multiple("horovod_powersgd.choosing", MOST_STEPS=8, FEW=50, CLOSE=0.0)
# While it is entered, tries are as short, and after them each comparison makes it look again.
looking_again = mock.patch.multiple(
    "horovod_powersgd.choosing",
    MOST_STEPS=4, TOGETHER=3, FEW=2, CLOSE=0.0, AGAIN_SECONDS=0.0, AGAIN_STEPS=0, CHANGE=1e9,
)  # fmt: skip


def choosing(*choices):
    """While it is entered, these choices are made after the steps, one after the other; the last one stays."""
    coming = iter(choices)

    def report(self, seconds, calibrate):
        self.choice = next(coming, self.choice)
        return self.choice

    return mock.patch.object(Chooser, "report", report)


def mean_gradients(step, workers, dtype, shapes=cases.SHAPES):
    """Of so many workers."""
    everyone = [cases.gradients(step, worker, dtype, shapes) for worker in range(workers)]
    return {name: np.mean([mine[name] for mine in everyone], axis=0) for name in everyone[0]}
