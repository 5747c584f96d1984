"""The import of Horovod's module for a framework, and why it fails."""

import importlib
import importlib.util
import os

from horovod_powersgd.environment.frameworks import FRAMEWORKS, TENSORFLOW, Framework
from horovod_powersgd.environment.installed_horovod import examine_horovod, horovod_problem
from horovod_powersgd.environment.problem import Problem, import_problem, reason

# The modules that Horovod imports beside a framework, and the distributions that have them.
_NEEDS = {
    "_cffi_backend": "cffi",
    "cffi": "cffi",
    "cloudpickle": "cloudpickle",
    "packaging": "packaging",
    "psutil": "psutil",
    "yaml": "pyyaml",
}


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
        raise ImportError(str(import_problem(wanted.title, error, wanted.requirement()))) from error
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
        what = f"Keras cannot be imported with the backend {backend} ({reason(error)})"
        return Problem(what, "export KERAS_BACKEND=tensorflow")
    return import_problem("Keras", error, keras.replace("_", "-"))


def _unexplained(framework: Framework, error: Exception) -> Problem:
    module = f"horovod.{framework.name}"
    what = f"{module} cannot be imported, although what was compiled for it loads ({reason(error)})"
    return Problem(f"{what}; the command says where it fails", f"python -c 'import {module}'")
