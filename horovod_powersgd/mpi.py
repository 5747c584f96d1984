"""The MPI that Horovod has loaded into this process, and how it asks a launcher for the other workers."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path


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
    if re.search(r"/libmpi(ch)?\.so\.12\b", maps):  # the name that they have agreed on
        return LoadedMpi("MPICH or Intel MPI", None if "/libpmix.so" in maps else "PMI")
    return None
