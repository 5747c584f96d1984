"""In which order the streams of a GPU wait for each other; there need not be a GPU."""

import contextlib

import pytest
import torch

from horovod_powersgd.torch import streams

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, name, calls):
        self._name, self._calls = name, calls

    def wait_stream(self, other):
        self._calls.append(f"{self._name} waits for {other._name}")


@pytest.fixture
def device(monkeypatch):
    """(streams by name, what was called, makes one current)."""
    calls, current = [], []
    named = {name: Stream(name, calls) for name in ("backward", "side", "caller")}

    @contextlib.contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(streams, "_is_current", lambda stream: current[-1] is stream)
    current.append(named["backward"])
    return named, calls, lambda name: current.append(named[name])


def test_an_exchange_stays_in_the_stream_of_its_first_gradient(device):
    named, calls, switch = device
    found = streams.Streams()
    found.wait_for_current(GPU)
    found.wait_for_current(GPU)
    assert calls == []
    switch("side")
    found.wait_for_current(GPU)  # a gradient of another stream
    assert calls == ["backward waits for side"]
    with found.current():
        assert torch.cuda.current_stream(GPU) is named["backward"]
    assert torch.cuda.current_stream(GPU) is named["side"]


def test_the_caller_of_step_waits_for_the_exchange(device):
    _, calls, switch = device
    found = streams.Streams()
    found.wait_for_current(GPU)
    switch("caller")
    found.release()
    assert calls == ["caller waits for backward"]
    found.wait_for_current(GPU)  # the next step's first gradient
    found.release()
    assert calls == ["caller waits for backward"]


def test_a_processor_has_no_streams(device):
    _, calls, switch = device
    found = streams.Streams()
    found.wait_for_current(torch.device("cpu"))
    switch("side")
    with found.current():
        found.release()
    assert calls == []
