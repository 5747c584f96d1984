"""What a step does on a GPU, as far as can be seen without one: PyTorch's fake tensors raise where the host would wait
for the device, and where devices are mixed."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from horovod_powersgd import Int8, PowerSGD
from horovod_powersgd.hosts import Host, RowShare
from horovod_powersgd.torch import quantization
from horovod_powersgd.torch.engine import Engine
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.step import Verdict
from horovod_powersgd.torch.streams import Streams
from horovod_powersgd.torch.workers import Workers

CONFIGS = [
    PowerSGD(rank=4),
    PowerSGD(rank=4, num_iters_per_step=1),
    PowerSGD(rank=4, wire_dtype="float16", warmup_steps=1),
    PowerSGD(rank=4, error_feedback=False, refresh_every=2),
    PowerSGD(rank=4, wire_dtype="int8"),
    PowerSGD(rank=4, memory_dtype="bfloat16"),
    Int8(block=64),
    PowerSGD(rank=4, hierarchical=True),
    PowerSGD(rank=4, hierarchical=True, wire_dtype="int8"),
    PowerSGD(rank=4, num_iters_per_step=1, hierarchical=True, memory_dtype="float16"),
]


# A job of one, without Horovod.
ALONE = SimpleNamespace(process_set_id=0, size=lambda: 1, rank=lambda: 0)
# Two workers share its host, both with what this one has.
HOST = Host(((0, 1),), 0, RowShare(0, 2))


class Exchanged:
    """What the workers of the host have sent to this one: twice what it has sent to itself."""

    def __init__(self, message, sizes):
        mine = message.split(list(sizes.values()))[0]
        self._found = torch.stack([mine, mine]).view(2, -1)

    def done(self):
        return True

    def result(self):
        return self._found


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("undoable", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_step_on_a_device_makes_the_host_wait_for_the_verdict_only(config, undoable, monkeypatch):
    asked = []
    monkeypatch.setattr(Verdict, "result", lambda self: asked.append(self) or True)
    monkeypatch.setattr(quantization, "_slices", quantization.Slices)  # which keeps tensors that only this test can use
    monkeypatch.setattr(Streams, "wait_for_current", lambda self, device: None)  # there are none
    monkeypatch.setattr(Workers, "exchange", lambda self, message, *others: Exchanged(message, others[-1]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(config, Workers(ALONE))
        shapes = {"matrix": (64, 48), "convolution": (16, 8, 3, 3), "vector": (37,)}
        parameters = {name: torch.nn.Parameter(torch.zeros(shape, device="cuda")) for name, shape in shapes.items()}
        for name, parameter in parameters.items():
            engine.add(name, parameter)
        if config.hierarchical:
            engine.generation = generation()  # a job of one would look for no host
            engine.share_host(HOST)
        for _ in range(4):
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, device="cuda")
            engine.finish(undoable)
            engine.commit()
        assert engine.steps == 4 and len(set(asked)) == 4
        memories = [gradient.memory for gradient in engine._gradients if gradient.compressed and config.error_feedback]
        for tensor in (*memories, *(parameter.grad for parameter in parameters.values())):
            assert tensor.device.type == "cuda"
