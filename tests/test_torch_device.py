"""What a step does on a GPU, as far as can be seen without one: PyTorch's fake tensors raise where the host would wait
for the device, and where devices are mixed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from horovod_powersgd import PowerSGD
from horovod_powersgd.layout import layout_of
from horovod_powersgd.torch.orthogonalization import orthogonalize
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient


@pytest.mark.parametrize("undoable", [False, True])
def test_a_step_on_a_device_does_not_make_the_host_wait(undoable):
    config = PowerSGD(rank=4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = torch.nn.Parameter(torch.zeros(64, 48, device="cuda"))
        gradient = PowerSGDGradient("weight", parameter, layout_of(parameter.shape, config), config)
        for _ in range(3):
            parameter.grad = torch.randn(64, 48, device="cuda")
            gradient.start(0, False, None)
            gradient.begin(1.0)
            for _ in range(2):
                gradient.receive(gradient.multiply(orthogonalize([gradient.mean], [gradient.spare])[0]))
            gradient.end(True, 1, undoable, [])
            if undoable:
                sample, update = gradient.sample()
                assert sample.factor(update).device.type == "cuda"
            gradient.commit(1.0 if undoable else None)
            assert parameter.grad.device.type == gradient.memory.device.type == "cuda"
