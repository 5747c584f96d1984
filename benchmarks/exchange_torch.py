"""A worker of exchange.py: exchanges a model's gradients by several methods, with PyTorch."""

import ctypes

import torch
import torch.distributed

import horovod_powersgd.torch as hvd
from distribution import distribute
from horovod_powersgd import Float16, cost
from horovod_powersgd.torch.calibration import Calibration
from methods import METHODS
from models import MODELS
from rounds import run_worker

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h has these numbers


class Arrival(torch.autograd.Function):
    """Its backward hands a parameter a copy of a given gradient: as a real one, it is new in every step."""

    @staticmethod
    def forward(ctx, loss, parameter, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, following):
        return following, ctx.gradient.clone(), None


class Model(torch.nn.Module):
    """Parameters of given shapes, whose gradients arrive one after the other, the last parameter's first."""

    def __init__(self, tensors, gradients):
        super().__init__()
        self.gradients = gradients
        for (name, _), gradient in zip(tensors, gradients):
            # Nobody looks at the values.
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(torch.empty_like(gradient)))

    def forward(self):
        loss = torch.zeros((), device=self.gradients[0].device)
        for parameter, gradient in zip(self.parameters(), self.gradients):
            loss = Arrival.apply(loss, parameter, gradient)
        return loss


class Still(torch.optim.Optimizer):
    """Changes nothing: a step of it is waiting for the averages."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


class Exchange:
    """One method's step: zero_grad, backward, and waiting for the averages."""

    def __init__(self, key, tensors, gradients):
        self._method = METHODS[key]
        self._parameters = Model(tensors, gradients)
        still = Still(self._parameters.parameters())
        self._model, self._optimizer = distribute(key, self._parameters, still)

    def step(self):
        self._optimizer.zero_grad()
        self._model().backward()
        if self._method.uses_horovod:
            self._optimizer.step()

    def pause(self):
        """Gives the gradients' memory to the next method."""
        self._optimizer.zero_grad()

    def stats(self):
        """This package's."""
        return self._optimizer.compression_stats()

    def bytes_sent(self):
        nbytes = sum(p.nbytes for p in self._parameters.parameters())
        return self._method.bytes_sent(nbytes, self.stats)


def keep_memory():
    """Lets malloc keep what is freed. It would give some of it back to the system and page it in again, in some steps
    or in all, by what else was allocated: which takes as long as an exchange."""
    malloc = ctypes.CDLL(None)
    if hasattr(malloc, "mallopt"):
        malloc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        malloc.mallopt(MMAP_THRESHOLD, 2**25)  # the largest that it takes


def exchanges(model, methods):
    if any(METHODS[key].library == "ddp" for key in methods):
        torch.distributed.init_process_group("gloo", rank=hvd.rank(), world_size=hvd.size())
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    tensors = MODELS[model]()
    gradients = [torch.randn(shape) for _, shape in tensors]
    return {key: Exchange(key, tensors, gradients) for key in methods}


def predict(model, exchanges):
    """{method: Prediction} of exchanges by Horovod's and this package's methods; of none where no exchange tells what
    backward takes."""
    shapes, found = [shape for _, shape in MODELS[model]()], {}
    if "no-exchange" not in exchanges:
        return found
    calibration = Calibration(hvd.global_process_set, shapes, device=torch.device("cpu"))
    calibration.hurries = False
    network = calibration.network(levels=True)
    for key in exchanges:
        method = METHODS[key]
        if method.library == "horovod":
            casts = calibration.work(Float16(error_feedback=False)) if method.compression == "fp16" else None
            found[key] = cost.predict_plain(shapes, network, casts)
        elif method.library == "ours":
            work = calibration.work(method.config)
            found[key] = cost.predict(shapes, method.config, network, work)
    return found


if __name__ == "__main__":
    keep_memory()
    run_worker(__doc__, exchanges, hvd, predict)
