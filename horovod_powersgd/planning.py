"""The command plan: finds the model, measures or is told what the network is, and prints the plan."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from horovod_powersgd.environment.frameworks import TENSORFLOW, TORCH
from horovod_powersgd.environment.installed_horovod import horovod_problem
from horovod_powersgd.layout import trailing_columns
from horovod_powersgd.network import Network
from horovod_powersgd.plan import SETTINGS, TYPICAL_WORK, Plan, bytes_per_second, seconds
from horovod_powersgd.shapes import Tensors, Unreadable, of_file, of_function

PLOTTED = ".png", ".svg", ".pdf"


class Refused(Exception):
    """What was asked for cannot be done; says why, and what to ask for."""


def main(options: argparse.Namespace) -> int:
    """Run the command; the exit status.

    Raises:
        Refused: there is no model to plan for, no network to measure, or an argument is wrong.
    """
    try:
        link = None if options.link is None else bytes_per_second(options.link)
        latency, backward = seconds(options.latency), seconds(options.backward)
    except ValueError as error:
        raise Refused(str(error)) from error
    per_host = options.workers_per_host
    if link is None and (options.workers is not None or per_host != 1):
        raise Refused("--workers and --workers-per-host go with --link; without it, the launcher's workers are counted")
    if link is not None and (options.workers is None or options.workers < 1):
        raise Refused("--link is of each host: say with --workers how many workers there are, one or more")
    if link is not None and (per_host < 1 or options.workers % per_host):
        raise Refused(f"--workers-per-host {per_host} does not divide --workers {options.workers}; hosts must be alike")
    if options.plot and Path(options.plot).suffix not in PLOTTED:
        raise Refused(f"--plot {options.plot}: its name ends in none of {', '.join(PLOTTED)}")
    tensors = _tensors(options)
    measured = _calibration(tensors)
    if link is not None:
        network = Network.of_links(options.workers, link, latency, per_host)
        works, first = TYPICAL_WORK, True
        if measured is not None:
            works, first = measured.works(SETTINGS, options.workers), measured.is_first
    elif measured is None:
        raise Refused("there is no Horovod here to measure with: say --link and --workers, or see doctor")
    elif measured.count == 1:
        raise Refused("one worker has no network to measure: start horovodrun -np N, or say --link and --workers")
    else:
        if measured.is_first:
            print(f"Measuring {measured.count} workers' messages, some seconds to a minute", file=sys.stderr)
        network, works, first = measured.network(levels=True), measured.works(SETTINGS), measured.is_first
    if not first:
        return 0
    plan = Plan.of(tensors, network, works, backward)
    try:
        if options.json in (None, "-"):
            print(plan.as_json() if options.json else plan.as_table(), flush=True)
        else:
            Path(options.json).write_text(plan.as_json() + "\n")
        if options.plot:
            plan.plot(options.plot)
    except ImportError as error:
        raise Refused(f"--plot needs matplotlib: {error}") from error
    except OSError as error:
        raise Refused(str(error)) from error
    return 0


def _tensors(options: argparse.Namespace) -> Tensors:
    sys.path.insert(0, "")  # as for python -m, a model's module may be in this folder
    try:
        tensors = of_function(options.model) if options.model else of_file(options.checkpoint or options.shapes)
    except Unreadable as error:
        raise Refused(str(error)) from error
    if not any(len(shape) > 1 for shape in tensors.shapes.values()):
        raise Refused("no tensor of this model has two axes: compressors have nothing to compress")
    return tensors


def _calibration(tensors: Tensors) -> Any:
    """What measures, in the job that was started; None without Horovod for PyTorch or TensorFlow. Where it serves both,
    TensorFlow measures for a model of Keras, and PyTorch for others."""
    is_keras = tensors.matrix_shape is trailing_columns
    frameworks = [TENSORFLOW, TORCH] if is_keras else [TORCH, TENSORFLOW]
    framework = next((framework for framework in frameworks if horovod_problem(framework) is None), None)
    if framework is None:
        return None
    try:
        hvd = importlib.import_module(f"horovod_powersgd.{framework.name}")
        calibration = importlib.import_module(f"horovod_powersgd.{framework.name}.calibration")
        hvd.init()
    except (ImportError, RuntimeError) as error:  # RuntimeError: a launcher's workers came up as jobs of one
        raise Refused(str(error)) from error
    measures = calibration.Calibration(hvd.global_process_set, list(tensors.shapes.values()), tensors.matrix_shape)
    measures.hurries = False
    return measures
