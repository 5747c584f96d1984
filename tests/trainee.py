"""Parameters whose gradients are given, and their optimizer."""

import os

import numpy as np
import torch

import cases
import horovod_powersgd.torch as hvd
from horovod_powersgd import reference

# Where the parameters are: benchmarks/gpu.py runs the same checks on a GPU.
DEVICE = os.environ.get("HOROVOD_POWERSGD_TEST_DEVICE", "cpu")


class Trainee:
    """Parameters whose gradients are given, and their optimizer."""

    def __init__(self, config, dtype="float32", shapes=cases.SHAPES, device=DEVICE, **options):
        self.parameters = {
            name: torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=device))
            for name, shape in shapes.items()
        }
        options.setdefault("named_parameters", self.parameters.items())
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.parameters.values(), lr=1.0), compression=config, **options
        )

    def backward(self, gradients):
        losses = []
        for name, p in self.parameters.items():
            losses.append((p * torch.from_numpy(np.asarray(gradients[name])).to(p.device)).sum())
        sum(losses).backward()

    def set_rate(self, rate):
        """As a learning-rate schedule does."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def saved(self):
        """This worker's compression state."""
        return self.optimizer.compression_state_dict()

    def load(self, states):
        """Goes on where a state, or all workers' states, were saved."""
        self.optimizer.load_compression_state_dict(states)

    def stats(self):
        return self.optimizer.compression_stats()

    def start(self, gradients):
        """Backward, which starts the exchange."""
        self.optimizer.zero_grad()
        self.backward(gradients)

    def finish(self):
        """The updates of the gradients of start; they are also applied."""
        self.optimizer.synchronize()
        updates = {name: _array(p.grad) for name, p in self.parameters.items()}
        with self.optimizer.skip_synchronize():
            self.optimizer.step()
        return updates

    def exchange(self, gradients):
        """Start and finish."""
        self.start(gradients)
        return self.finish()

    def state(self):
        """This worker's state as the reference keeps it."""
        engine = self.optimizer._engine
        state = reference.State(steps=engine.stats().steps)
        for gradient in engine._gradients:
            if getattr(gradient, "memory", None) is not None:
                state.memory[gradient.name] = _array(gradient.memory)
            if hasattr(gradient, "factor"):
                factor = _array(gradient.factor.t())
                state.factors[gradient.name] = reference.Factor(factor, gradient.factor_is_q)
        return state


def _array(tensor):
    return tensor.cpu().numpy().copy()
