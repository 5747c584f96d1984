"""What the checks of hvd.Auto share, whatever the framework: choices that are made for it, and what it is given."""

from unittest import mock

import numpy as np

import cases
from horovod_powersgd.choosing import Choice, Chooser

PLAIN = Choice()
# While it is entered, a try takes a few steps, and what was chosen is not compared before 50 more.
short_tries = mock.patch.multiple("horovod_powersgd.choosing", MOST_STEPS=8, FEW=50)


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
