"""Predicts what TensorFlow's Auto loses by choosing for sets of matrices, not for each: steps with rank 4 on two hosts.

    python benchmarks/tensor_by_tensor.py

Passes are measured here, by one worker; links are made up, and so are messages: a millisecond, and the link's rate.
"""

import math

import horovod_powersgd.tensorflow as hvd
from exchange_tensorflow import layout
from horovod_powersgd import Auto, PowerSGD
from horovod_powersgd.choosing import Chooser
from horovod_powersgd.cost import Work, predict
from horovod_powersgd.layout import trailing_columns
from horovod_powersgd.network import Curve, Network
from horovod_powersgd.tensorflow.auto_exchange import NUMBERS
from horovod_powersgd.tensorflow.calibration import passes
from models import MODELS, TITLES

LINKS = [1e9, 2.5e9, 5e9, 1e10, 1.5e10, 2e10, 2.5e10]  # bits per second
RANK_4 = PowerSGD(4)


def milliseconds(shapes, network, work, sizes):
    """Of a step where matrices of fewer numbers than one of these sizes may travel as they are; None: any may."""
    sets = None if sizes is None else [{n for n, s in shapes.items() if math.prod(s) < size} for size in (0, *sizes)]
    for choice in Chooser(Auto(RANK_4), shapes, trailing_columns, sets)._promising(0, RANK_4, network, work):
        plain = [i for i, name in enumerate(shapes) if name in choice.plain]
        return 1e3 * predict(list(shapes.values()), RANK_4, network, work, trailing_columns, plain).seconds


def main():
    hvd.init()
    small, *more = NUMBERS.values()
    print(f"{'':<14}{'Gbit/s':>8}{'each':>8}{'none, or of fewer than':>24} {small:,}, or {more[0]:,}")
    for model, title in TITLES.items():
        shapes = {name: layout(shape) for name, shape in MODELS[model]()}
        work = Work.fitted(passes(RANK_4, hvd.global_process_set, list(shapes.values())))
        for link in LINKS:
            messages = Curve(((0, 1e-3), (1e9, 1e-3 + 8e9 / link)))
            network = Network(2, messages, messages, messages, messages)
            steps = [milliseconds(shapes, network, work, sizes) for sizes in (None, [small], [small, *more])]
            if None not in steps:
                print(f"{title:<14}{link / 1e9:>8}" + "".join(f"{step:>8.1f}" for step in steps), flush=True)


if __name__ == "__main__":
    main()
