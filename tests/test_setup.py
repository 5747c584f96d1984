"""The set-up behind make demo and make test: what it says, and that a second run does nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from environments import REPOSITORY, link_programs

PROGRAMS = ["bash", "dirname", "uname", "cat", "cmp", "tee", "grep", "tail", "rm", "mkdir", "chmod", "g++", "make"]

# Stands for every interpreter: it answers questions as the real one, and notes what it is told to install.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
    "-m venv --clear "*)
        mkdir -p "${@: -1}/bin"
        cat "$0" >"${@: -1}/bin/python"
        chmod +x "${@: -1}/bin/python" ;;
    *" --target "*) mkdir -p .venv/triton ;;
    -m*) ;;
    *) exec REAL "$@" ;;
esac
echo "$*" >>"CALLS"
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    (folder / ".ci").mkdir(parents=True)
    built = ["environment/horovod_build.py", "kernels/kernels.cpp", "kernels/kernels.h", "kernels/quantization.cpp"]
    built = [f"horovod_powersgd/{name}" for name in built]
    for name in (".ci/setup", ".ci/run", "setup.py", "pyproject.toml", "Makefile", *built):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    link_programs(tmp_path / "programs", [*PROGRAMS, "env"])
    make_interpreter(tmp_path / "programs/python3", INTERPRETER)
    return folder


def make_interpreter(path: Path, text: str) -> None:
    real = getattr(sys, "_base_executable", sys.executable)
    path.write_text(text.replace("REAL", real).replace("CALLS", str(path.parent.parent / "calls")))
    path.chmod(0o755)


def set_up(checkout, **variables):
    environment = {"PATH": str(checkout.parent / "programs"), "HOME": str(checkout), **variables}
    return subprocess.run([checkout / ".ci/setup"], env=environment, capture_output=True, text=True, timeout=60)


def calls(checkout):
    path = checkout.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def error_of(outcome):
    assert outcome.returncode == 1
    assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
    return outcome.stderr


def test_everything_is_installed_once(checkout):
    first = set_up(checkout)
    assert first.returncode == 0, first.stderr
    venv, install, triton, horovod = calls(checkout)
    assert venv == "-m venv --clear .venv"
    assert install.startswith("-m pip install") and install.endswith("--editable .[dev]")
    assert triton.startswith("-m pip install") and " --target .venv/triton triton==" in triton
    assert horovod == "-m horovod_powersgd install-horovod"
    second = set_up(checkout)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(calls(checkout)) == 4


@pytest.mark.parametrize(
    "name",
    [
        "setup.py",
        *(f"horovod_powersgd/kernels/{name}" for name in ("kernels.cpp", "quantization.cpp")),
        "horovod_powersgd/environment/horovod_build.py",
    ],
)
def test_what_changed_is_installed_into_the_same_environment(checkout, name):
    set_up(checkout)
    with open(checkout / name, "a") as file:
        file.write("# changed\n")
    assert set_up(checkout).returncode == 0
    assert [call.split()[1] for call in calls(checkout)[4:]] == ["pip", "horovod_powersgd"]


def test_an_environment_made_by_hand_is_brought_up_to_date(checkout):
    (checkout / ".venv/bin").mkdir(parents=True)
    make_interpreter(checkout / ".venv/bin/python", INTERPRETER.replace("CALLS", str(checkout.parent / "calls")))
    assert set_up(checkout).returncode == 0
    assert [call.split()[1] for call in calls(checkout)] == ["pip", "pip", "horovod_powersgd"]


def test_a_run_that_failed_is_not_taken_for_done(checkout):
    failing = INTERPRETER.replace("    -m*) ;;", '    "-m pip"*) echo "ERROR: no route"; exit 1 ;;\n    -m*) ;;')
    make_interpreter(checkout.parent / "programs/python3", failing)
    outcome = set_up(checkout)
    assert outcome.returncode == 1
    assert "ERROR: no route" in outcome.stderr
    assert "pip could not install the packages: is there a network?" in outcome.stderr
    assert not (checkout / ".venv/setup-stamp").exists()
    assert set_up(checkout).returncode == 1


@pytest.mark.parametrize("program, said", [("g++", "install g++"), ("make", "install make")])
def test_a_missing_tool_is_named_before_anything_is_made(checkout, program, said):
    (checkout.parent / "programs" / program).unlink()
    assert said in error_of(set_up(checkout))
    assert not (checkout / ".venv").exists()


def test_an_unsupported_python_is_named(checkout):
    old = "#!/usr/bin/env bash\nif [[ $1 == --version ]]; then echo Python 3.9.2; else exit 1; fi\n"
    make_interpreter(checkout.parent / "programs/old", old)
    assert "Python 3.10 to 3.14 is needed, and old is Python 3.9.2." in error_of(set_up(checkout, PYTHON="old"))
    make_interpreter(checkout.parent / "programs/python3", old)
    assert "make PYTHON=/path/to/python3" in error_of(set_up(checkout))


def test_a_python_that_tensorflow_is_not_for_is_told(checkout):
    newest = INTERPRETER.replace("    -m*) ;;", '    -m*) ;;\n    *"version_info >= (3, 14)"*) exit 1 ;;')
    make_interpreter(checkout.parent / "programs/newest", newest)
    assert "no TensorFlow, which is for Python 3.10 to 3.13" in set_up(checkout, PYTHON="newest").stdout
    shutil.rmtree(checkout / ".venv")
    assert "PyTorch, TensorFlow and Open MPI" in set_up(checkout, PYTHON="python3").stdout


def test_a_missing_venv_module_is_named(checkout):
    text = INTERPRETER.replace("    -m*) ;;", '    *ensurepip*) exit 1 ;;\n    -m*) ;;')
    make_interpreter(checkout.parent / "programs/python3", text)
    assert "install python3-venv" in error_of(set_up(checkout))


def test_another_python_does_not_replace_an_environment(checkout):
    set_up(checkout)
    other = INTERPRETER.replace("    -m*) ;;", '    --version) echo Python 3.12.9; exit ;;\n    -m*) ;;')
    make_interpreter(checkout.parent / "programs/python3.12", other)
    assert "remove it first with make clean" in error_of(set_up(checkout, PYTHON="python3.12"))
    assert len(calls(checkout)) == 4


def test_make_chooses_the_interpreter(checkout):
    make_interpreter(checkout.parent / "programs/chosen", INTERPRETER)
    (checkout.parent / "programs/python3").unlink()
    (checkout.parent / "programs/sh").symlink_to(shutil.which("sh"))
    environment = {"PATH": str(checkout.parent / "programs"), "HOME": str(checkout)}
    command = ["make", "PYTHON=chosen", "setup"]
    outcome = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    assert len(calls(checkout)) == 4
    assert os.access(checkout / ".venv/bin/python", os.X_OK)
