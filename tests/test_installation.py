"""Importing without a usable Horovod says what is wrong and names the command that mends it."""

import time

import pytest
from environments import Environment

from horovod_powersgd import installation

COMMAND = "python -m horovod_powersgd install-horovod"


@pytest.fixture
def environment(tmp_path):
    return Environment.make(tmp_path)


def import_error(environment, framework="torch"):
    code = f"from horovod_powersgd.installation import require_horovod; require_horovod({framework!r})"
    outcome = environment.run("-c", code)
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


def test_the_real_horovod_is_found_usable_quickly():
    began = time.monotonic()
    for framework in installation.FRAMEWORKS.values():
        assert installation.horovod_problem(framework) is None
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("framework", installation.FRAMEWORKS.values(), ids=lambda framework: framework.name)
def test_the_real_horovod_tells_what_it_was_built_with(framework):
    features = installation.horovod_features(framework)
    assert features["mpi"] and features["gloo"]
    assert set(features) == set(installation.FEATURES)
