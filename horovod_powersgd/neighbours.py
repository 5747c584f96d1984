"""Other processes of this machine, whose memory can be read where it is: by Linux's process_vm_readv, if it may be.

A process has to be of the same user, and in the same container (its number must mean the same here). Where Yama lets
only a parent read its children, offer() lets any process of the user read this one, as Open MPI does.
"""

import ctypes
import os
import secrets
from collections.abc import Sequence

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_SET_READER, _ANYBODY = 0x59616D61, ctypes.c_ulong(-1)  # prctl's PR_SET_PTRACER, PR_SET_PTRACER_ANY
# What others read to see that it is this process that they read.
_TOKEN = ctypes.c_int64()


class _Part(ctypes.Structure):
    """The system's iovec."""

    _fields_ = [("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


def offer() -> list[int]:
    """Lets other processes read this one: the numbers by which they find out whether they can, the first of them this
    process's."""
    if hasattr(_LIBRARY, "prctl"):
        _LIBRARY.prctl(_SET_READER, _ANYBODY, 0, 0, 0)  # without Yama it is refused, and not needed
    _TOKEN.value = _TOKEN.value or secrets.randbits(62) + 1
    return [os.getpid(), ctypes.addressof(_TOKEN), _TOKEN.value]


def is_readable(offered: Sequence[int]) -> bool:
    """Whether the process that offered these numbers can be read from here."""
    process, address, token = offered
    found = ctypes.c_int64()
    try:
        read(process, address, ctypes.sizeof(found), ctypes.addressof(found))
    except OSError:
        return False
    return found.value == token


def read(process: int, address: int, nbytes: int, to: int) -> None:
    """Copies from another process's memory to an address of this one's.

    Raises:
        OSError: that is not allowed, not known to this system, or the memory or the process is gone.
    """
    if not hasattr(_LIBRARY, "process_vm_readv"):
        raise OSError("this system has no process_vm_readv")
    done = 0
    while done < nbytes:
        theirs, mine = (_Part(start + done, nbytes - done) for start in (address, to))
        count = _LIBRARY.process_vm_readv(process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
        if count <= 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        done += count
