"""Horovod from its source: how a wheel is built, kept and installed.

`pip install horovod` fails beside every current torch and TensorFlow; the released source builds with a few lines
changed (horovod_patches). The wheel that comes out is kept in the user's cache, under a key that says all it was built
for, so that a second environment installs it in seconds. Nothing of the build is left in the environment: the tools
that it needs go into a folder of its own.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from horovod_powersgd.environment.cuda_toolkit import (
    compiler_environment,
    nccl_environment,
    toolkit_environment,
    wants_gpu,
)
from horovod_powersgd.environment.frameworks import TENSORFLOW, TORCH, Framework
from horovod_powersgd.environment.horovod_patches import PATCH_VERSION, patch_source
from horovod_powersgd.environment.installed_horovod import extension_path
from horovod_powersgd.environment.installed_mpi import find_mpi, mpi_variables
from horovod_powersgd.environment.logged_run import BuildError, LoggedRun
from horovod_powersgd.environment.packages import find_program

HOROVOD_VERSION = "0.28.1"
# Versions that were tried together. Horovod's setup.py fails with later setuptools, its copy of Gloo with CMake 4.
BUILD_TOOLS = ("setuptools==80.10.2", "wheel==0.48.0", "packaging>=24", "cmake==3.31.10")
# Measured for both frameworks: nine minutes of one core.
_CORE_MINUTES = 10
# The HOROVOD_* variables that Horovod's build reads; the others are for running jobs.
_BUILD_VARIABLE = re.compile(
    r"HOROVOD_(WITH|GPU|CUDA|NCCL|NVTX|ROCM|BUILD|ALLOW_MIXED|CPU_OPERATIONS|DEBUG|SKIP_COMPILE|LOCAL_VERSION).*"
)


@dataclass(frozen=True)
class HorovodBuild:
    """What a wheel of Horovod is built for."""

    torch: str | None  # version, or None to leave it out
    tensorflow: str | None
    mpi: str | None  # identity of the MPI, or None to leave it out
    settings: tuple[tuple[str, str], ...] = ()  # the user's own HOROVOD_* variables
    python: str = str(sys.implementation.cache_tag)
    platform: str = sysconfig.get_platform()
    horovod: str = HOROVOD_VERSION
    patch: int = PATCH_VERSION

    @classmethod
    def for_environment(cls, no_mpi: bool = False, torch_only: bool = False) -> "HorovodBuild":
        """For the frameworks and the MPI that are installed here, as far as they are wanted.

        Raises:
            BuildError: there is no framework, or a HOROVOD_WITH_* variable asks for what is not there.
        """
        frameworks = [TORCH] if torch_only else [TORCH, TENSORFLOW]
        versions = {framework.metadata_key.upper(): framework.version() for framework in frameworks}
        found = {"PYTORCH": None, "TENSORFLOW": None, **versions, "MPI": None if no_mpi else find_mpi().identity()}
        for name, value in found.items():
            if os.environ.get(f"HOROVOD_WITHOUT_{name}") == "1":
                found[name] = None
            elif os.environ.get(f"HOROVOD_WITH_{name}") == "1" and value is None:
                raise BuildError(f"HOROVOD_WITH_{name}=1 is set, but none is found: install it, or unset the variable.")
        if found["PYTORCH"] is None and found["TENSORFLOW"] is None:
            wanted = "PyTorch is not" if torch_only else "Neither PyTorch nor TensorFlow is"
            raise BuildError(f"{wanted} installed here: first run {sys.executable} -m pip install torch.")
        settings = [(name, value) for name, value in os.environ.items() if _BUILD_VARIABLE.fullmatch(name)]
        return cls(found["PYTORCH"], found["TENSORFLOW"], found["MPI"], tuple(sorted(settings)))

    @property
    def frameworks(self) -> list[Framework]:
        """The frameworks that it is built for."""
        return [framework for framework, version in ((TORCH, self.torch), (TENSORFLOW, self.tensorflow)) if version]

    @property
    def key(self) -> str:
        """The name of its folder in the cache: readable, and different for whatever must not be mixed up."""
        parts = [f"horovod-{self.horovod}", self.python, self.platform]
        parts += [f"torch-{self.torch}"] if self.torch else []
        parts += [f"tensorflow-{self.tensorflow}"] if self.tensorflow else []
        parts += ["mpi"] if self.mpi else []
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return "_".join([*parts, digest[:12]])

    @property
    def folder(self) -> Path:
        """Where its wheel, and the log of its building, are kept."""
        return cache_folder() / self.key

    def cached_wheel(self) -> Path | None:
        """The finished wheel, or None."""
        return next(iter(sorted(self.folder.glob("horovod-*.whl"))), None)

    def __str__(self) -> str:
        targets = [f"PyTorch {self.torch}"] if self.torch else []
        targets += [f"TensorFlow {self.tensorflow}"] if self.tensorflow else []
        return f"{' and '.join(targets)}, {'with MPI and Gloo' if self.mpi else 'with Gloo, without MPI'}"


def cache_folder() -> Path:
    """The user's cache of wheels, outside every checkout and environment."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "horovod-powersgd"


def check_prerequisites() -> None:
    """Look for what cannot be had by pip before anything slow starts.

    Raises:
        BuildError: something is missing; the message names it and says what to do.
    """
    if sys.platform != "linux":
        raise BuildError(f"Horovod is built on Linux only, and this is {sys.platform}.")
    externally_managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and externally_managed.exists():
        raise BuildError("This is the system's own Python: make an environment first, python3 -m venv FOLDER.")
    if shutil.which(os.environ.get("CXX", "").split(" ")[0] or "g++") is None:
        raise BuildError("No C++ compiler: install g++ (Fedora: gcc-c++).")
    if shutil.which("make") is None:
        raise BuildError("No make: install make.")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise BuildError("Python's C headers are missing: install python3-dev (Fedora: python3-devel).")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        raise BuildError(f"No pip in this environment: run {sys.executable} -m ensurepip.")


def build_wheel(build: HorovodBuild, report: Callable[[str], None], afresh: bool = False) -> Path:
    """Build the wheel and keep it in the cache; what an interrupted run finished is not done again.

    Args:
        build: what to build for.
        report: is called with lines for the user while it goes on.
        afresh: ignore what earlier runs left, a finished wheel included.

    Raises:
        BuildError: a step failed; the message has the last lines of the log, and its path.
    """
    build.folder.mkdir(parents=True, exist_ok=True)
    # Paths of this environment are recorded in a half-finished build, which no other one may continue.
    work = build.folder / f"work-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"
    with _locked(build.folder / "lock", report) as lock:
        if afresh:
            shutil.rmtree(work, ignore_errors=True)
        elif (built := build.cached_wheel()) is not None:  # another process built it while this one waited
            return built
        run = LoggedRun(build.folder / "build.log", lock)
        tools = _get_tools(work, run, report)
        source = _get_source(work, tools, run, report)
        jobs = _jobs()
        environment = _build_environment(build, tools, jobs)
        environment |= nccl_environment(environment, work / "nccl") | toolkit_environment(environment)
        if wants_gpu(environment):
            environment |= compiler_environment(environment, work / "cuda", partial(_get_compiler, run, report))
        minutes = max(1, round(_CORE_MINUTES * (1.0 if build.torch and build.tensorflow else 0.6) / jobs))
        _forget_what_was_found(source)
        report(f"Building Horovod {HOROVOD_VERSION} for {build}")
        report(f"This takes about {minutes} minute{'s' * (minutes > 1)} with {jobs} core{'s' * (jobs > 1)}, once.")
        run(
            "Building Horovod failed",
            # The option comes first to hide the command from setup.py, which would have old setuptools fetch what
            # Horovod needs at run time.
            [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(work / "dist")],
            environment,
            folder=source,
            report=report,
        )
        finished = next((work / "dist").glob("horovod-*.whl"))
        _check_wheel(finished, build)
        (build.folder / "built-for.json").write_text(json.dumps(asdict(build), indent=2) + "\n")
        wheel = build.folder / finished.name
        os.replace(finished, wheel)
        for leftover in build.folder.glob("work-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return wheel


def install_wheel(wheel: Path, log: Path) -> None:
    """Install a wheel of Horovod, in place of any that is there, and what it needs.

    Raises:
        BuildError: pip failed; the message has the last lines of its log.
    """
    run = LoggedRun(log)
    # Forced, because pip takes the same version for the same build; alone, because force would reinstall all it needs.
    for options in (["--force-reinstall", "--no-deps"], []):
        run("Installing Horovod failed", _pip("install", *options, str(wheel)))


def _get_tools(work: Path, run: LoggedRun, report: Callable[[str], None]) -> Path:
    tools = work / "tools"
    if not tools.exists():
        report("Getting build tools ...")
        unfinished = _emptied(work / "unfinished-tools")
        failure = "pip could not install the build tools: is there a network, and are pip's index settings right?"
        run(failure, _pip("install", "--target", str(unfinished), *BUILD_TOOLS))
        os.replace(unfinished, tools)
    return tools


def _get_compiler(run: LoggedRun, report: Callable[[str], None], requirement: str, folder: Path) -> None:
    report("Getting CUDA's compiler ...")
    unfinished = _emptied(folder.with_name("unfinished-cuda"))
    failure = "pip could not install CUDA's compiler: install the CUDA toolkit, or set HOROVOD_CUDA_HOME"
    run(failure, _pip("install", "--target", str(unfinished), requirement))
    os.replace(unfinished, folder)


def _get_source(work: Path, tools: Path, run: LoggedRun, report: Callable[[str], None]) -> Path:
    source = work / "source"
    if not source.exists():
        report("Getting Horovod's source ...")
        download = _emptied(work / "download")
        failure = "pip could not download Horovod's source: is there a network, and are pip's index settings right?"
        # pip asks the source for its name and needs, with the tools that are going to build it.
        options = ["--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--dest", str(download)]
        run(failure, _pip("download", *options, f"horovod=={HOROVOD_VERSION}"), _with_tools(tools))
        with tarfile.open(next(download.glob("horovod-*.tar.gz"))) as archive:
            archive.extractall(download)
        unpacked = download / f"horovod-{HOROVOD_VERSION}"
        patch_source(unpacked)
        os.replace(unpacked, source)
        shutil.rmtree(download)
    return source


def _forget_what_was_found(source: Path) -> None:
    """Lets CMake look again for compilers and libraries: an earlier build may have failed by what it had found. What is
    compiled already stays."""
    for kept in source.glob("build/temp*/*/CMakeCache.txt"):
        kept.unlink()
        for folder in kept.parent.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(folder)


def _check_wheel(wheel: Path, build: HorovodBuild) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modules = set(archive.namelist())
    for framework in build.frameworks:
        if extension_path(framework) not in modules:
            log = build.folder / "build.log"
            raise BuildError(f"The wheel that was built does not serve {framework.title} (log: {log})")


def _with_tools(tools: Path) -> dict[str, str]:
    paths = [str(tools), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _build_environment(build: HorovodBuild, tools: Path, jobs: int) -> dict[str, str]:
    environment = _with_tools(tools)
    environment.setdefault("HOROVOD_CMAKE", str(tools / "cmake/data/bin/cmake"))
    for feature, wanted in {
        "PYTORCH": build.torch,
        "TENSORFLOW": build.tensorflow,
        "MPI": build.mpi,
        "MXNET": None,
    }.items():
        chosen, other = ("WITH", "WITHOUT") if wanted else ("WITHOUT", "WITH")
        environment.pop(f"HOROVOD_{other}_{feature}", None)
        environment[f"HOROVOD_{chosen}_{feature}"] = "1"
    compiler = find_program("mpicxx")
    if compiler is not None:  # CMake looks for it in PATH
        environment.update(mpi_variables(compiler))
    # Started by make, this has the flags of that make, which are not for the one inside.
    if "MAKELEVEL" in environment or "MAKEFLAGS" not in environment:
        environment["MAKEFLAGS"] = f"-j{jobs}"
        for name in ("MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
            environment.pop(name, None)
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    return environment


def _jobs() -> int:
    # A compiler working on a framework's headers takes up to 2 GB.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2_000_000_000))


def _pip(command: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", command, "--disable-pip-version-check", "--retries", "2", *arguments]


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[int]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that builds the same Horovod ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
