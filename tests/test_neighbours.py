"""Reading other processes' memory."""

import ctypes
import subprocess
import sys

import pytest

from horovod_powersgd import neighbours

OFFERS = """
import ctypes
from horovod_powersgd import neighbours
numbers = (ctypes.c_double * 1000)(*range(1000))
print(*neighbours.offer(), ctypes.addressof(numbers), flush=True)
input()
"""


@pytest.fixture
def neighbour():
    """A process that can be read: what it offers, and where it has the numbers from 0 to 999."""
    with subprocess.Popen([sys.executable, "-c", OFFERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        *offered, address = map(int, process.stdout.readline().split())
        yield offered, address
        process.communicate(b"\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process_vm_readv is Linux's")
def test_what_another_process_has_is_read(neighbour):
    (process, *_), address = neighbour
    assert neighbours.is_readable(neighbour[0])
    found = (ctypes.c_double * 10)()
    neighbours.read(process, address + 8 * 500, 8 * 10, ctypes.addressof(found))
    assert list(found) == list(range(500, 510))


def test_who_is_not_the_one_that_offered_is_not_readable(neighbour):
    (process, address, token), _ = neighbour
    assert not neighbours.is_readable([process, address, token + 1])
    assert not neighbours.is_readable([process, 8, token])  # no memory is there
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    assert not neighbours.is_readable([gone.pid, address, token])


def test_without_the_system_s_function_nothing_is_readable(monkeypatch):
    offered = neighbours.offer()
    monkeypatch.setattr(neighbours, "_LIBRARY", object())
    assert not neighbours.is_readable(offered)
    assert neighbours.offer() == offered
