"""The MPI of this environment, or else of PATH, and whether Horovod was built for it."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from horovod_powersgd.environment.frameworks import FRAMEWORKS
from horovod_powersgd.environment.installed_horovod import horovod_extension
from horovod_powersgd.environment.packages import find_program
from horovod_powersgd.mpi import linked_mpi, title_of


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


def _said_by(program: Path, option: str) -> str:
    environment = {**os.environ, **mpi_variables(program)}
    try:
        outcome = subprocess.run([program, option], capture_output=True, text=True, timeout=60, env=environment)
        return outcome.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
