"""Horovod, as it is installed here, and whether it can serve a framework.

Neither is imported into this process, which would take seconds: files are read, and what only a loaded module can tell
is asked in a process of its own.
"""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from horovod_powersgd.environment.frameworks import Framework
from horovod_powersgd.environment.packages import distribution_version, package_directory
from horovod_powersgd.environment.problem import Problem, import_problem, reason

# Where horovod/metadata.json has the version of the patches that install-horovod built it with.
PATCHES_KEY = "horovod-powersgd"
# What Horovod can be built with, as its functions call it and as people write it.
FEATURES = {"mpi": "MPI", "gloo": "Gloo", "nccl": "NCCL", "cuda": "CUDA", "rocm": "ROCm", "ddl": "DDL", "ccl": "oneCCL"}

# The extension is linked against the framework's libraries, but may not know where they are. Loading them takes a
# fraction of the time that importing the framework takes; importing is the way of last resort.
_LOAD_EXTENSION = """
import ctypes, importlib, json, sys
framework, extension, features, *libraries = sys.argv[1:]
try:
    for library in libraries:
        ctypes.CDLL(library)
except OSError:
    try:
        importlib.import_module(framework)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(FRAMEWORK_FAILS)
loaded = ctypes.CDLL(extension)
print(json.dumps({name: bool(getattr(loaded, f"horovod_{name}_built")()) for name in features.split()}))
"""
_FRAMEWORK_FAILS = 3


def horovod_version() -> str | None:
    """The version of the installed Horovod, or None."""
    if package_directory("horovod") is None:
        return None
    return distribution_version("horovod") or "unknown"


def horovod_extension(framework: Framework) -> Path | None:
    """Horovod's compiled module for a framework, or None where it was not built."""
    directory = package_directory("horovod")
    if directory is None:
        return None
    path = directory.parent / extension_path(framework)
    return path if path.is_file() else None


def extension_path(framework: Framework) -> str:
    """Where Horovod's compiled module for a framework is, in site-packages and in a wheel."""
    return f"horovod/{framework.name}/{framework.extension}{sysconfig.get_config_var('EXT_SUFFIX')}"


def built_for(framework: Framework) -> str | None:
    """The version of the framework that the installed Horovod was built for; None where it was not or does not say."""
    return None if horovod_extension(framework) is None else _horovod_metadata().get(framework.metadata_key)


def horovod_patches() -> int | None:
    """The version of install-horovod's patches that the installed Horovod has; None where it does not say."""
    return _horovod_metadata().get(PATCHES_KEY)


def horovod_problem(framework: Framework) -> Problem | None:
    """Why the installed Horovod cannot serve a framework, as far as files tell; None where nothing is wrong."""
    if framework.directory() is None:
        return Problem(f"{framework.title} is not installed", f"pip install {framework.name}")
    if horovod_version() is None:
        return Problem("Horovod is not installed")
    if horovod_extension(framework) is None:
        return Problem(f"Horovod was built without {framework.title}")
    wanted, found = built_for(framework), framework.version() or "unknown"
    if wanted is not None and _normalised(wanted) != _normalised(found):
        return Problem(f"Horovod was built for {framework.title} {wanted}, but {found} is installed")
    return None


def examine_horovod(framework: Framework) -> tuple[Problem | None, dict[str, bool]]:
    """Why the installed Horovod cannot serve a framework, which is looked for by loading it, or else what it has.

    Returns:
        (None where nothing is wrong, what horovod_features says or an empty dictionary)
    """
    problem = horovod_problem(framework)
    if problem is None:
        try:
            return None, horovod_features(framework)
        except ImportError as error:
            problem = import_problem(framework.title, str(error), framework.requirement())
        except OSError as error:
            problem = Problem(f"Horovod's module for {framework.title} does not load: {error}")
    return problem, {}


def horovod_features(framework: Framework) -> dict[str, bool]:
    """What Horovod's compiled module for a framework was built with: FEATURES, each true or false.

    Raises:
        ImportError: it cannot be loaded because the framework itself cannot; the message is what that says.
        OSError: the module is missing or cannot be loaded; the message is the loader's.
    """
    extension = horovod_extension(framework)
    if extension is None:
        raise OSError(f"Horovod was built without {framework.title}")
    directory = framework.directory()
    libraries = [directory / library for library in framework.libraries] if directory else []
    program = _LOAD_EXTENSION.replace("FRAMEWORK_FAILS", str(_FRAMEWORK_FAILS))
    arguments: list[str | Path] = [framework.name, extension, " ".join(FEATURES), *libraries]
    command = [sys.executable, "-c", program, *arguments]
    try:
        # A module that was built for something else can crash or hang whoever loads it.
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise OSError("loading it takes more than two minutes") from None
    if outcome.returncode < 0:
        raise OSError(f"loading it ends the process with signal {-outcome.returncode}")
    if outcome.returncode == _FRAMEWORK_FAILS:
        raise ImportError(reason(outcome.stdout))
    if outcome.returncode != 0:
        raise OSError((outcome.stderr.strip() or "no reason is given").splitlines()[-1])
    return json.loads(outcome.stdout.splitlines()[-1])


def _horovod_metadata() -> dict:
    directory = package_directory("horovod")
    try:
        return {} if directory is None else json.loads((directory / "metadata.json").read_text())
    except (OSError, ValueError):
        return {}


def _normalised(version: str) -> str:
    # TensorFlow calls itself 2.22.0-rc1 where its distribution is 2.22.0rc1.
    return re.sub(r"[-.](?=rc|dev)", "", version)
