"""A worker of exchange.py: exchanges a model's gradients by several methods, with PyTorch."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed

import horovod_powersgd.torch as hvd
from distribution import distribute
from methods import METHODS
from models import MODELS
from rounds import measure_rounds


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
        loss = torch.zeros(())
        for parameter, gradient in zip(self.parameters(), self.gradients):
            loss = Arrival.apply(loss, parameter, gradient)
        return loss


class Exchange:
    """One method's step: zero_grad, backward, and waiting for the averages."""

    def __init__(self, key, tensors, gradients):
        self._method = METHODS[key]
        self._parameters = Model(tensors, gradients)
        sgd = torch.optim.SGD(self._parameters.parameters(), lr=0.0)
        self._model, self._optimizer = distribute(key, self._parameters, sgd)

    def step(self):
        self._optimizer.zero_grad()
        self._model().backward()
        if self._method.uses_horovod:
            self._optimizer.synchronize()

    def pause(self):
        """Gives the gradients' memory to the next method."""
        self._optimizer.zero_grad()

    def bytes_sent(self):
        """What this worker hands to allreduce in a step, on average; None where the method does not say."""
        if self._method.library is None:
            return 0
        if self._method.library == "ours":
            stats = self._optimizer.compression_stats()
            return round(stats.total_bytes_sent / stats.steps)
        ratio = self._method.numbers_ratio
        return None if ratio is None else sum(p.nbytes for p in self._parameters.parameters()) // ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()

    hvd.init()
    if any(METHODS[key].library == "ddp" for key in args.methods):
        torch.distributed.init_process_group("gloo", rank=hvd.rank(), world_size=hvd.size())
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    tensors = MODELS[args.model]()
    gradients = [torch.randn(shape) for _, shape in tensors]
    exchanges = {key: Exchange(key, tensors, gradients) for key in args.methods}
    rows = measure_rounds(exchanges, args.rounds, hvd)
    if hvd.rank() == 0:
        args.results.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
