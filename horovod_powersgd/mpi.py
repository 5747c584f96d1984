"""The MPI that Horovod has loaded into this process, and how it asks a launcher for the other workers."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# The title, as people write it, of those whose library has this name; and the name: MPICH and Intel have agreed on it.
_SHARED, _SHARED_NAME = "MPICH or Intel MPI", r"\blibmpi(ch)?\.so\.12\b"


@dataclass(frozen=True)
class LoadedMpi:
    """An MPI library.

    Attributes:
        title: as people write it.
        interface: by which alone it finds the other workers, 'PMIx' or 'PMI'; None where it may know several.
        here: whether it is an Open MPI of this environment, where pip put it.
    """

    title: str
    interface: str | None
    here: bool = False


def loaded_mpi() -> LoadedMpi | None:
    """What Horovod has loaded; None where that is no MPI, or none that is known."""
    try:
        return recognised(Path("/proc/self/maps").read_text(), os.path.realpath(sys.prefix))
    except OSError:
        return None


def recognised(maps: str, prefix: str) -> LoadedMpi | None:
    """The MPI among the files that a process has mapped.

    Args:
        maps: the text of its /proc/self/maps.
        prefix: of its environment, without links.
    """
    if f" {prefix}/lib/libopen-pal.so" in maps:
        return LoadedMpi("Open MPI", "PMIx", here=True)
    if "/libopen-pal.so" in maps:
        return LoadedMpi("Open MPI", None)  # some are built with Slurm's PMI
    if re.search(_SHARED_NAME, maps):
        return LoadedMpi(_SHARED, None if "/libpmix.so" in maps else "PMI")
    return None


def linked_mpi(library: Path) -> str | None:
    """The title of the MPI for which a library was compiled; None where that is none, or none that is known."""
    content = library.read_bytes()
    if b"\0libmpi.so.40\0" in content:  # of the releases since 2018
        return "Open MPI"
    return _SHARED if re.search(_SHARED_NAME.encode(), content) else None


def title_of(version: str) -> str | None:
    """The title of an MPI, as linked_mpi gives it, by its name and version; None where it is none that is known."""
    if version.startswith("Open MPI "):
        return "Open MPI"
    return _SHARED if version.startswith(("MPICH ", "Intel MPI ")) else None
