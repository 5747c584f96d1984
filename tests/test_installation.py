"""What is installed is found; importing without a usable Horovod says what is wrong and the command that mends it."""

import time

import pytest

from environments import Environment
from horovod_powersgd.environment import horovod_build, installed_horovod, installed_mpi
from horovod_powersgd.environment.frameworks import FRAMEWORKS

COMMAND = "python -m horovod_powersgd install-horovod"


@pytest.fixture
def environment(tmp_path):
    return Environment.make(tmp_path)


def import_error(environment, framework="torch", before="pass", **variables):
    code = f"from horovod_powersgd.environment import horovod_import, installed_horovod; {before}; "
    code += f"horovod_import.require_horovod({framework!r})"
    outcome = environment.run("-c", code, **variables)
    assert outcome.returncode == 1
    return outcome.stderr.splitlines()[-1]


def test_a_missing_framework_is_named(environment):
    assert import_error(environment, "tensorflow") == (
        "ImportError: horovod_powersgd.tensorflow needs TensorFlow. Run: pip install tensorflow"
    )


def test_a_missing_horovod_is_named(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    assert import_error(environment) == f"ImportError: Horovod is not installed. Run: {COMMAND}"


def test_a_folder_that_is_called_horovod_is_not_horovod(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    (environment.packages / "horovod").mkdir()
    assert "Horovod is not installed" in import_error(environment)


def test_a_horovod_without_the_framework_is_named(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_framework("tensorflow", "2.21.0")
    environment.add_horovod(tensorflow="2.21.0")
    assert import_error(environment) == f"ImportError: Horovod was built without PyTorch. Run: {COMMAND}"


def test_a_horovod_for_another_version_is_named(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_horovod(torch="2.12.1+cpu")
    assert import_error(environment) == (
        f"ImportError: Horovod was built for PyTorch 2.12.1+cpu, but 2.13.0+cpu is installed. Run: {COMMAND}"
    )


def test_a_horovod_that_does_not_load_is_named(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_horovod(torch="2.13.0+cpu")
    message = import_error(environment)
    assert message.startswith("ImportError: Horovod's module for PyTorch does not load: ")
    assert message.endswith(f"Run: {COMMAND}")


BROKEN = {
    "OSError: libcudart.so.12: cannot open shared object file": ("torch", "raise OSError(REASON)"),
    "ModuleNotFoundError: No module named 'typing_extensions'": ("torch", "import typing_extensions"),
    "ImportError: numpy.core.multiarray failed to import": ("tensorflow", "raise ImportError(REASON)"),
    "TypeError: Descriptors cannot be created directly.": ("tensorflow", "raise TypeError(REASON + '\\nMore here')"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_framework_that_does_not_load_is_not_for_horovod_to_mend(environment, reason):
    framework, program = BROKEN[reason]
    environment.add_framework(framework, "2.13.0")
    environment.add_horovod(**{framework: "2.13.0"})
    program = program.replace("REASON", repr(reason.partition(": ")[2]))
    (environment.packages / framework / "__init__.py").write_text(program)
    assert import_error(environment, framework) == (
        f"ImportError: {FRAMEWORKS[framework].title} itself cannot be imported, with or without Horovod "
        f"({reason}); pip brings what it needs. Run: pip install --force-reinstall {framework}"
    )


def fails_without_its_fault(environment, framework, program, **variables):
    """What require_horovod says where Horovod's compiled module loads, and importing horovod.FRAMEWORK fails."""
    environment.add_framework(framework, "2.21.0")
    environment.add_horovod(**{framework: "2.21.0"})
    (environment.packages / "horovod" / framework / "__init__.py").write_text(program)
    loads = "installed_horovod.horovod_features = lambda framework: {}"
    return import_error(environment, framework, before=loads, **variables)


def test_a_missing_tf_keras_is_named(environment):
    message = fails_without_its_fault(environment, "tensorflow", "raise RecursionError", TF_USE_LEGACY_KERAS="1")
    assert message == (
        "ImportError: TF_USE_LEGACY_KERAS=1 asks for Keras 2, which is not installed (without it, it is Keras 3). "
        "Run: pip install 'tf-keras==2.21.*'"
    )


@pytest.mark.parametrize("variables", [{}, {"KERAS_BACKEND": "jax"}])
def test_a_keras_whose_backend_is_missing_is_named(environment, variables):
    (environment.packages / "keras.py").write_text("import jax")
    message = fails_without_its_fault(environment, "tensorflow", "import keras", **variables)
    assert message == (
        "ImportError: Keras cannot be imported with the backend jax (ModuleNotFoundError: No module named 'jax'). "
        "Run: export KERAS_BACKEND=tensorflow"
    )


def test_a_keras_that_does_not_load_is_not_for_horovod_to_mend(environment):
    (environment.packages / "keras.py").write_text("raise AttributeError('no ml_dtypes')")
    message = fails_without_its_fault(environment, "tensorflow", "raise RecursionError")
    assert "Keras itself cannot be imported, with or without Horovod (AttributeError: no ml_dtypes)" in message
    assert message.endswith("Run: pip install --force-reinstall keras")


def test_a_missing_package_that_horovod_needs_is_named(environment):
    message = fails_without_its_fault(environment, "torch", "import yaml")
    assert message == "ImportError: Horovod needs yaml, which is not installed. Run: pip install pyyaml"


def test_what_nobody_foresaw_is_not_for_horovod_to_mend(environment):
    message = fails_without_its_fault(environment, "torch", "raise ValueError('odd')")
    assert "although what was compiled for it loads (ValueError: odd)" in message
    assert message.endswith("Run: python -c 'import horovod.torch'")


def test_two_spellings_of_a_version_are_the_same_version(environment):
    environment.add_framework("tensorflow", "2.22.0-rc1")
    environment.add_horovod(tensorflow="2.22.0rc1")
    assert "does not load" in import_error(environment, "tensorflow")


def test_looking_at_what_is_installed_imports_no_framework(environment):
    code = (
        "import sys, horovod_powersgd.__main__ as main; main.main(['--help']) if sys.argv[1:] else None;"
        "print([name for name in ('horovod', 'torch', 'tensorflow') if name in sys.modules])"
    )
    environment.add_framework("torch", "2.13.0")
    assert environment.run("-c", code).stdout == "[]\n"


@pytest.mark.framework
def test_the_real_horovod_is_found_usable_quickly():
    began = time.monotonic()
    for framework in FRAMEWORKS.values():
        assert installed_horovod.horovod_problem(framework) is None
    assert time.monotonic() - began < 1


@pytest.mark.framework
def test_the_real_horovod_tells_which_patches_it_has():
    assert installed_horovod.horovod_patches() == horovod_build.PATCH_VERSION


@pytest.mark.framework
@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=lambda framework: framework.name)
def test_the_real_horovod_tells_what_it_was_built_with(framework):
    features = installed_horovod.horovod_features(framework)
    assert features["mpi"] and features["gloo"]
    assert set(features) == set(installed_horovod.FEATURES)


@pytest.mark.parametrize(
    "said, version",
    [
        ("mpirun (Open MPI) 4.1.8\n\nReport bugs to ...", "Open MPI 4.1.8"),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", "MPICH 5.0.2"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626\nMore", "Intel MPI 2021.18.1"),
        ("Some other MPI 1.0\nmore", "Some other MPI 1.0"),
        ("", "unknown"),
    ],
)
def test_an_mpi_is_named_by_what_its_mpirun_says(said, version):
    assert installed_mpi._mpi_version(said) == version


def test_an_mpi_whose_programs_look_for_each_other_is_found_in_an_environment_that_is_not_activated(environment):
    programs = environment.folder / "venv/bin"  # as Intel's are, where pip has put them
    for name, text in {
        "mpirun": "helper",
        "helper": "echo 'Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626'",
        "mpicxx": 'echo "g++ -I$I_MPI_ROOT/include"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    code = "from horovod_powersgd.environment.installed_mpi import find_mpi; print(find_mpi().identity())"
    assert environment.run("-c", code).stdout == "Intel MPI 2021.18.1: g++ -IPREFIX/include\n"
