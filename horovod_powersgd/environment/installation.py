"""What is installed in this environment: torch, TensorFlow, MPI and Horovod.

Nothing here imports a framework into this process, which would take seconds: files are read, and what only a loaded
module can tell is asked in a process of its own. The one exception is require_horovod, whose caller is about to import
Horovod anyway.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from horovod_powersgd.mpi import linked_mpi, title_of

INSTALL_COMMAND = "python -m horovod_powersgd install-horovod"
# Where horovod/metadata.json has the version of the patches that install-horovod built it with.
PATCHES_KEY = "horovod-powersgd"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command that mends it."""

    what: str
    command: str = INSTALL_COMMAND

    def __str__(self) -> str:
        return f"{self.what}. Run: {self.command}"


@dataclass(frozen=True)
class Framework:
    """A framework that Horovod can be built for."""

    name: str  # of its module, and of the module inside horovod
    title: str  # as people write it
    distributions: tuple[str, ...]  # the names under which package indexes have it
    metadata_key: str  # its key in horovod/metadata.json
    extension: str  # Horovod's compiled module for it
    libraries: tuple[str, ...]  # of the framework, needed before the extension can be loaded

    def directory(self) -> Path | None:
        """The folder of the installed framework, or None."""
        return _package_directory(self.name)

    def version(self) -> str | None:
        """Its version as it gives it itself (with torch's local part, as in 2.13.0+cpu), or None."""
        directory = self.directory()
        if directory is None:
            return None
        # An index's torch 2.13.0 can call itself 2.13.0+cu130, and Horovod records what torch calls itself.
        stated = directory / "version.py"
        if stated.is_file():
            match = re.search(r"^__version__\s*=\s*['\"](.+?)['\"]", stated.read_text(), re.MULTILINE)
            if match:
                return match.group(1)
        return (self._distribution() or (None, "unknown"))[1]

    def requirement(self) -> str:
        """What pip is told to get the one that is installed, as in torch==2.13.0."""
        return "==".join(self._distribution() or (self.name,))

    def _distribution(self) -> tuple[str, str] | None:
        found = ((name, distribution_version(name)) for name in self.distributions)
        return next(((name, version) for name, version in found if version is not None), None)


TORCH = Framework(
    name="torch",
    title="PyTorch",
    distributions=("torch",),
    metadata_key="pytorch",
    extension="mpi_lib_v2",
    libraries=("lib/libtorch_python.so",),
)
TENSORFLOW = Framework(
    name="tensorflow",
    title="TensorFlow",
    distributions=("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-rocm", "tf-nightly"),
    metadata_key="tensorflow",
    extension="mpi_lib",
    libraries=("libtensorflow_framework.so.2", "libtensorflow_cc.so.2"),
)
FRAMEWORKS = {framework.name: framework for framework in (TORCH, TENSORFLOW)}


def installed_frameworks() -> list[Framework]:
    """The frameworks that can be imported here."""
    return [framework for framework in FRAMEWORKS.values() if framework.directory() is not None]


def horovod_version() -> str | None:
    """The version of the installed Horovod, or None."""
    if _package_directory("horovod") is None:
        return None
    return distribution_version("horovod") or "unknown"


def horovod_extension(framework: Framework) -> Path | None:
    """Horovod's compiled module for a framework, or None where it was not built."""
    directory = _package_directory("horovod")
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
            problem = _broken(framework.title, str(error), framework.requirement())
        except OSError as error:
            problem = Problem(f"Horovod's module for {framework.title} does not load: {error}")
    return problem, {}


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
# What Horovod can be built with, as its functions call it and as people write it.
FEATURES = {"mpi": "MPI", "gloo": "Gloo", "nccl": "NCCL", "cuda": "CUDA", "rocm": "ROCm", "ddl": "DDL", "ccl": "oneCCL"}


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
        raise ImportError(_reason(outcome.stdout))
    if outcome.returncode != 0:
        raise OSError((outcome.stderr.strip() or "no reason is given").splitlines()[-1])
    return json.loads(outcome.stdout.splitlines()[-1])


def require_horovod(framework: str) -> None:
    """Import Horovod's module for 'torch' or 'tensorflow', or say why that is impossible and what to do.

    Raises:
        ImportError: the framework, its Keras or Horovod is missing or cannot be imported, or Horovod was built without
            the framework or for another version of it. The message says which, and names the command that mends it.
    """
    wanted = FRAMEWORKS[framework]
    if wanted.directory() is None:
        raise ImportError(f"horovod_powersgd.{framework} needs {wanted.title}. Run: pip install {framework}")
    error = _import_error(wanted.name)
    if error is not None:
        raise ImportError(str(_broken(wanted.title, error, wanted.requirement()))) from error
    problem = horovod_problem(wanted)
    if problem is not None:
        raise ImportError(str(problem))
    error = _import_error(f"horovod.{framework}")
    if error is not None:
        # Building Horovod anew mends what was compiled, and nothing else.
        problem = examine_horovod(wanted)[0] or _missing_package(error) or _keras_problem(wanted)
        raise ImportError(str(problem or _unexplained(wanted, error))) from error


def _import_error(module: str) -> Exception | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # TensorFlow's loader raises its own kinds, and whatever is broken any other
        return error
    return None


def _broken(title: str, error: Exception | str, requirement: str) -> Problem:
    what = f"{title} itself cannot be imported, with or without Horovod ({_reason(error)}); pip brings what it needs"
    return Problem(what, f"pip install --force-reinstall {requirement}")


# The modules that Horovod imports beside a framework, and the distributions that have them.
_NEEDS = {
    "_cffi_backend": "cffi",
    "cffi": "cffi",
    "cloudpickle": "cloudpickle",
    "packaging": "packaging",
    "psutil": "psutil",
    "yaml": "pyyaml",
}


def _missing_package(error: Exception) -> Problem | None:
    if isinstance(error, ModuleNotFoundError) and error.name in _NEEDS:
        return Problem(f"Horovod needs {error.name}, which is not installed", f"pip install {_NEEDS[error.name]}")
    return None


def _keras_problem(framework: Framework) -> Problem | None:
    """Why tf.keras does not load, which by itself recurses until Python ends it."""
    if framework is not TENSORFLOW:
        return None
    legacy = os.environ.get("TF_USE_LEGACY_KERAS")
    keras = "tf_keras" if legacy in ("true", "True", "1") else "keras"  # as TensorFlow reads it
    if keras == "tf_keras" and importlib.util.find_spec(keras) is None:
        # Another tf-keras would bring another TensorFlow.
        release = ".".join((framework.version() or "").split(".")[:2])
        what = f"TF_USE_LEGACY_KERAS={legacy} asks for Keras 2, which is not installed (without it, it is Keras 3)"
        return Problem(what, f"pip install 'tf-keras=={release}.*'")
    error = _import_error(keras)
    if error is None:
        return None
    backend = os.environ.get("KERAS_BACKEND") or getattr(error, "name", None)  # which ~/.keras can ask for, too
    if keras == "keras" and backend in ("jax", "openvino", "torch"):
        what = f"Keras cannot be imported with the backend {backend} ({_reason(error)})"
        return Problem(what, "export KERAS_BACKEND=tensorflow")
    return _broken("Keras", error, keras.replace("_", "-"))


def _unexplained(framework: Framework, error: Exception) -> Problem:
    module = f"horovod.{framework.name}"
    what = f"{module} cannot be imported, although what was compiled for it loads ({_reason(error)})"
    return Problem(f"{what}; the command says where it fails", f"python -c 'import {module}'")


def _reason(error: Exception | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0].strip() if text.strip() else "no reason is given"


@dataclass(frozen=True)
class Mpi:
    """The MPI of this environment; each part can be missing."""

    compiler: Path | None  # mpicxx, which Horovod needs to be built with MPI
    launcher: Path | None  # mpirun
    version: str | None  # such as 'Open MPI 4.1.8'

    def identity(self) -> str | None:
        """What tells two MPIs apart for whoever links against one, the same in every copy of an environment."""
        if self.compiler is None:
            return None
        shown = _said_by(self.compiler, "-show")
        for prefix in (os.path.realpath(sys.prefix), sys.prefix):
            shown = shown.replace(prefix, "PREFIX")
        return f"{self.version}: {shown}"


def find_mpi() -> Mpi:
    """The MPI of this environment, or else of PATH."""
    launcher = find_program("mpirun")
    version = None
    if launcher is not None:
        version = _mpi_version(_said_by(launcher, "--version"))
    return Mpi(compiler=find_program("mpicxx"), launcher=launcher, version=version)


def mpi_variables(program: Path) -> dict[str, str]:
    """Of the environment in which an MPI's program works: Intel's look for each other in PATH, and pip does not tell
    its compilers where they are."""
    return {
        "PATH": os.pathsep.join([str(program.parent), os.environ.get("PATH", os.defpath)]),
        "I_MPI_ROOT": os.environ.get("I_MPI_ROOT") or str(program.parent.parent),
    }


def mpi_problem() -> str | None:
    """What is wrong where Horovod was built for another MPI than is here; else None."""
    here = find_mpi().version
    title = title_of(here or "")
    for extension in filter(None, map(horovod_extension, FRAMEWORKS.values())):
        built_for = linked_mpi(extension)
        if title is not None and built_for is not None and title != built_for:
            return f"Horovod was built for {built_for}, and {here} is here: mpirun cannot start it"
    return None


def _mpi_version(said: str) -> str:
    """The name and version of the MPI whose mpirun --version has said this."""
    for title, pattern in (
        ("Open MPI", r"mpirun \(Open MPI\) (\S+)"),
        ("MPICH", r"HYDRA build details:\s+Version:\s+(\S+)"),
        ("Intel MPI", r"Intel\(R\) MPI Library for Linux\* OS, Version (\S+)"),
    ):
        if match := re.match(pattern, said):
            return f"{title} {match.group(1)}"
    return (said.splitlines() or ["unknown"])[0].strip()


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_program(name: str) -> Path | None:
    """A program of this environment, or else of PATH: an environment need not be activated to be used."""
    folders = [str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")]
    found = next((path for folder in folders if (path := shutil.which(name, path=folder))), None) or shutil.which(name)
    return Path(found) if found else None


def _said_by(program: Path, option: str) -> str:
    environment = {**os.environ, **mpi_variables(program)}
    try:
        outcome = subprocess.run([program, option], capture_output=True, text=True, timeout=60, env=environment)
        return outcome.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _package_directory(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    # A folder that merely has the name is a namespace package, without an origin.
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _horovod_metadata() -> dict:
    directory = _package_directory("horovod")
    try:
        return {} if directory is None else json.loads((directory / "metadata.json").read_text())
    except (OSError, ValueError):
        return {}


def _normalised(version: str) -> str:
    # TensorFlow calls itself 2.22.0-rc1 where its distribution is 2.22.0rc1.
    return re.sub(r"[-.](?=rc|dev)", "", version)
