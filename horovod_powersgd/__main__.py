"""The command line, python -m horovod_powersgd: install Horovod, examine what is installed, plan a job, and run
programs that import Horovod, with compression."""

import argparse
import importlib
import os
import signal
import sys

if sys.version_info < (3, 10):  # before what follows fails with a SyntaxError or worse
    sys.exit(f"error: Python 3.10 or later is needed, and this is {sys.version.split()[0]}.")

from horovod_powersgd import activation, planning
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.environment import doctor, horovod_build
from horovod_powersgd.environment.horovod_patches import missing_patches
from horovod_powersgd.environment.installed_horovod import FEATURES, examine_horovod, horovod_patches, horovod_version
from horovod_powersgd.environment.installed_mpi import find_mpi, mpi_problem
from horovod_powersgd.environment.logged_run import BuildError
from horovod_powersgd.environment.problem import INSTALL_COMMAND, Problem
from horovod_powersgd.expression import compressor_from
from horovod_powersgd.program import run_program


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit status: 0 where the command did what it is for, 1 where it did not, 130 where it was interrupted.

    Raises:
        Exception, SystemExit: what a program raises that is run.
    """
    options = _parser().parse_args(argv)
    if options.run is _run_program:  # signals are the program's own
        return _run_program(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a build's compilers must end with it
    try:
        return options.run(options)
    except (BuildError, planning.Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m horovod_powersgd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    install = commands.add_parser(
        "install-horovod",
        help="build Horovod for what is installed here, and install it",
        description=f"Build Horovod {horovod_build.HOROVOD_VERSION} from its source for the PyTorch and TensorFlow of "
        "this environment, with Gloo, and with MPI where an mpicxx is found, and install it. A Horovod that already "
        "works is left alone. Wheels are kept in $XDG_CACHE_HOME/horovod-powersgd (~/.cache by default). "
        "HOROVOD_* variables pass through: HOROVOD_GPU_OPERATIONS=NCCL builds for GPUs.",
    )
    install.add_argument("--force", action="store_true", help="build again from the start, whatever is there")
    install.add_argument("--no-mpi", action="store_true", help="without MPI, even where it is found")
    install.add_argument("--torch-only", action="store_true", help="without TensorFlow, even where it is installed")
    install.set_defaults(run=_install_horovod)

    examine = commands.add_parser(
        "doctor",
        help="say what is installed, what works, and how to mend the rest",
        description="Say what is installed, run a job of two workers under each launcher, and name the command that "
        "mends each problem. The exit status is 0 only if a job of two workers works.",
        epilog=doctor.JSON_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    examine.add_argument("--json", action="store_true", help="print one JSON object")
    examine.set_defaults(run=lambda options: doctor.main(as_json=options.json))

    plan = commands.add_parser(
        "plan",
        help="predict what each way of exchanging a model's gradients takes, and recommend one",
        description="Predict what a step takes with each setting of compression=, and recommend one. Under a launcher, "
        "as in horovodrun -np 8 -H ... python -m horovod_powersgd plan --model mine:make, messages and passes are "
        "measured, in some seconds to a minute; alone, --link and --workers say what the network is.",
    )
    model = plan.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="MODULE:FUNCTION", help="a function that makes a model of PyTorch or Keras")
    model.add_argument("--checkpoint", metavar="FILE", help=".pt (weights only), .safetensors, .keras or .index.json")
    model.add_argument("--shapes", metavar="FILE", help=".json: {name: [sides]}, or a list of shapes")
    plan.add_argument("--link", metavar="RATE", help="of each host, as 1gbit: in place of measuring")
    plan.add_argument("--latency", metavar="TIME", default="50us", help="with --link, to the next worker (50us)")
    plan.add_argument("--workers", type=int, metavar="N", help="with --link")
    plan.add_argument("--workers-per-host", type=int, default=1, metavar="L", help="with --link, of the N (1)")
    plan.add_argument("--backward", metavar="TIME", default="0s", help="that computing takes in a step, as 80ms (0s)")
    plan.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print one JSON object, or write it to a file: horovodrun marks each line that a worker prints",
    )
    plan.add_argument("--plot", metavar="FILE", help="draw the steps' times, as a .png, .svg or .pdf")
    plan.set_defaults(run=planning.main)

    run = commands.add_parser(
        "run",
        help="run a program that imports Horovod, with compression",
        description="Run a script that imports horovod.torch, horovod.tensorflow or horovod.keras as Python does, but "
        "for this: distributed optimizers and tapes that it gives no compression compress. Every worker runs this: "
        "horovodrun -np 4 python -m horovod_powersgd run --compression 'PowerSGD(rank=4)' train.py",
        allow_abbrev=False,
    )
    run.add_argument(
        "--compression",
        required=True,
        type=_compressor,
        metavar="COMPRESSOR",
        help="with its arguments, as in Python: 'PowerSGD(rank=4)'",
    )
    run.add_argument("-m", dest="as_module", action="store_true", help="the program is a module, as in python -m")
    run.add_argument(
        "program", nargs=argparse.PARSER, metavar="PROGRAM", help="a script, or a module, and its own arguments"
    )
    run.set_defaults(run=_run_program)
    return parser


def _compressor(expression: str) -> Compressor:
    try:
        return compressor_from(expression)
    except ValueError as error:  # of which argparse would not tell the message
        raise argparse.ArgumentTypeError(str(error)) from error


def _run_program(options: argparse.Namespace) -> int:
    if horovod_version() is None:
        print(f"error: {Problem('Horovod is not installed')}", file=sys.stderr)
        return 1
    if not options.as_module and not os.path.isfile(options.program[0]):
        print(f"error: there is no script {os.path.abspath(options.program[0])}", file=sys.stderr)
        return 2
    for framework in (activation.TORCH, activation.TENSORFLOW):
        framework.activate(options.compression)
    run_program(options.program, options.as_module)
    return 0


def _install_horovod(options: argparse.Namespace) -> int:
    build = horovod_build.HorovodBuild.for_environment(no_mpi=options.no_mpi, torch_only=options.torch_only)
    if not options.force:
        problems, features = _examine(build)
        for problem in problems:
            if problem.command != INSTALL_COMMAND:
                raise BuildError(str(problem))
        stale = [what for what in (build.mpi and mpi_problem(), missing_patches()) if what]
        # One that somebody else built, with settings of their own, is theirs to replace.
        if not problems and (not stale or horovod_patches() is None):
            _say(f"Horovod {horovod_version()} works already, for {_titles(build)}, with {_names(features)}.")
            if build.mpi and not features["mpi"]:
                _say(f"It was built without MPI, and {find_mpi().version} is here: {INSTALL_COMMAND} --force uses it.")
            for what in stale:
                _say(f"{what}: {INSTALL_COMMAND} --force mends that.")
            return 0
        for what in [problem.what for problem in problems] or stale:
            _say(f"{what}.")

    wheel = None if options.force else build.cached_wheel()
    if wheel is None:
        horovod_build.check_prerequisites()
        wheel = horovod_build.build_wheel(build, report=_say, afresh=options.force)
    _say(f"Installing {wheel}")
    horovod_build.install_wheel(wheel, log=build.folder / "install.log")

    problems, features = _examine(build)
    if problems:
        raise BuildError(
            f"{problems[0].what}, although it was just installed: {INSTALL_COMMAND} --force builds it afresh "
            f"(log: {build.folder / 'build.log'})"
        )
    _say(f"Horovod {horovod_version()} is installed, for {_titles(build)}, with {_names(features)}.")
    return 0


def _examine(build: horovod_build.HorovodBuild) -> tuple[list[Problem], dict[str, bool]]:
    """What keeps the installed Horovod from serving a build's frameworks, and what it has for all of them."""
    importlib.invalidate_caches()
    problems: list[Problem] = []
    features: dict[str, bool] = {}
    for framework in build.frameworks:
        problem, found = examine_horovod(framework)
        features.update({name: there and features.get(name, True) for name, there in found.items()})
        if problem is not None and problem not in problems:
            problems.append(problem)
    return problems, features


def _titles(build: horovod_build.HorovodBuild) -> str:
    return " and ".join(f"{framework.title} {framework.version()}" for framework in build.frameworks)


def _names(features: dict[str, bool]) -> str:
    return ", ".join(title for name, title in FEATURES.items() if features[name])


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
