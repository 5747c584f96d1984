"""The gradients of an optimizer's parameters, and what is kept of them from step to step."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from horovod_powersgd import checkpoint
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import Host
from horovod_powersgd.layout import layout_of
from horovod_powersgd.statistics import TensorStats
from horovod_powersgd.torch.compressed_gradient import CompressedGradient
from horovod_powersgd.torch.fast_paths import path_of
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.two_level_gradient import TwoLevelGradient
from horovod_powersgd.torch.workers import Workers

DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16


class GradientSet:
    """The gradients of an optimizer's parameters, for one compressor.

    Args:
        config: the compressor.
        sparse_as_dense: compress sparse gradients, too.

    Attributes:
        gathers: whether some gradients are sparse, on some worker, and do not become dense.
    """

    def __init__(self, config: Compressor, sparse_as_dense: bool):
        self.config, self.sparse_as_dense, self.gathers = config, sparse_as_dense, False
        self._gradients: list[PlainGradient] = []
        # Each one's other way: averaged as it is.
        self._plain: dict[PlainGradient, PlainGradient] = {}

    def __iter__(self) -> Iterator[PlainGradient]:
        return iter(self._gradients)

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Takes in a parameter, between two steps."""
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return  # it cannot have a gradient
        if parameter.dtype not in DTYPES:
            kind = type(self.config).__name__
            raise ValueError(f"{kind} exchanges real gradients of 16 to 64 bits; {name} is {parameter.dtype}")
        layout = layout_of(parameter.shape, self.config)
        plain = PlainGradient(name, parameter, layout, self.sparse_as_dense)
        gradient = plain
        if layout.compressed:
            cls = path_of(self.config).gradient
            gradient = cls(name, parameter, layout, self.config, self.sparse_as_dense)
        self._gradients.append(gradient)
        self._plain[gradient] = plain

    def by_name(self) -> dict[str, PlainGradient]:
        """The gradients, by their parameters' names."""
        return {gradient.name: gradient for gradient in self._gradients}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes, by their names."""
        return {gradient.name: gradient.layout.shape for gradient in self._gradients}

    def sort(self) -> None:
        """From now on they are in the order of their names."""
        self._gradients.sort(key=lambda gradient: gradient.name)

    def of_step(self, number: int, as_they_are: Collection[str]) -> tuple[PlainGradient, ...]:
        """The gradients of a step: a frozen parameter has none, on all workers.

        Args:
            number: how many steps came before: in a warm-up all are averaged as they are.
            as_they_are: names of those that are in any step.
        """
        warming_up = number < self.config.warmup_steps
        return tuple(
            self._plain[gradient] if warming_up or gradient.name in as_they_are else gradient
            for gradient in self._gradients
            if gradient.parameter.requires_grad
        )

    def set_sparse_dims(self, dims: Mapping[str, int]) -> None:
        """Takes note of which gradients are sparse on some worker, and how: sparse_dim, by name."""
        for gradient in (*self._plain, *self._plain.values()):
            gradient.sparse_dim = 0 if self.sparse_as_dense else dims.get(gradient.name, 0)
        self.gathers = any(gradient.sparse_dim for gradient in self._gradients)

    def share_host(self, host: Host | None) -> None:
        """Between two steps: lets the exchange have two levels, or one where the host is None."""
        for gradient in self._gradients:
            if isinstance(gradient, TwoLevelGradient):
                gradient.share = None if host is None else host.share

    def take_over(self, other: "GradientSet") -> bool:
        """Goes on where another set ends, if it is one of the same parameters and configuration; whether it is."""
        mine, theirs = self.by_name(), other.by_name()
        if self.config != other.config or mine.keys() != theirs.keys():
            return False
        if any(gradient.parameter is not theirs[name].parameter for name, gradient in mine.items()):
            return False
        for name, gradient in mine.items():
            gradient.take_over(theirs[name])
        return True

    def has_memory(self) -> bool:
        """Whether any of them has something left from the steps before."""
        return any(gradient.memory is not None for gradient in self._compressed())

    def shared_state(self) -> list:
        """What is the same on all workers that have taken the same steps."""
        return [gradient.shared_state() for gradient in self._compressed()]

    def load_shared_state(self, states: Sequence) -> None:
        """Takes another worker's."""
        for gradient, state in zip(self._compressed(), states):
            gradient.load_shared_state(state)

    def _compressed(self) -> list[CompressedGradient]:
        return [gradient for gradient in self._gradients if isinstance(gradient, CompressedGradient)]

    def state_dict(self, workers: Workers, steps: int) -> dict[str, Any]:
        """This worker's state: tensors, numbers and strings."""
        tensors = {gradient.name: gradient.state_dict() for gradient in self._gradients}
        return checkpoint.state_dict(self.config, workers.count, workers.index, steps, tensors)

    def share_of(self, states: Mapping | Iterable[Mapping], workers: Workers) -> checkpoint.Share:
        """This worker's part of saved states: checkpoint.share_of."""
        return checkpoint.share_of(states, self.config, self.shapes(), workers.count, workers.index)

    def load(self, share: checkpoint.Share) -> None:
        """Goes on where the states were made."""
        for gradient in self._gradients:
            memories = share.memories.get(gradient.name, ())
            gradient.load_state_dict(share.tensors[gradient.name], memories, share.weight)

    def stats(self, warming_up: bool) -> tuple[TensorStats, ...]:
        """Of each gradient, after a step."""
        return tuple(self._stats_of(gradient, warming_up) for gradient in self._gradients)

    def _stats_of(self, gradient: PlainGradient, warming_up: bool) -> TensorStats:
        decisions = gradient.accordion.decisions if isinstance(gradient, CompressedGradient) else ()
        return TensorStats.of(
            gradient.name,
            gradient.layout,
            self.config,
            bool(gradient.sparse_dim),
            warming_up,
            gradient.residual,
            decisions,
        )
