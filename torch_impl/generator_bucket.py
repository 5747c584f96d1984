"""Gradients that are exchanged together, each as its compressor's generator says."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch

from horovod_powersgd.compressors.collectives import AllreduceMean, QuantizedMean
from horovod_powersgd.quantization import rows_of
from horovod_powersgd.torch.bucket import Bucket, joined
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.generator_gradient import GeneratorGradient
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.quantization import quantized_mean
from horovod_powersgd.torch.senders import Senders
from horovod_powersgd.torch.step import Step


class GeneratorBucket(Bucket):
    """Gradients whose generators go through their rounds together: what they ask for travels in one flat tensor for
    each collective and dtype."""

    gradients: Sequence[GeneratorGradient]

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        for gradient in self.gradients:
            gradient.start(step.number, step.rates.get(gradient.parameter), self._workers)
        dense = yield from self._begin(self.gradients, step, sparse)
        for number in itertools.count():
            asking = [gradient for gradient in dense if gradient.request is not None]
            if not asking:
                break
            quantized = [gradient for gradient in asking if isinstance(gradient.request, QuantizedMean)]
            others = [gradient for gradient in asking if gradient not in quantized]
            started = self._start(others, f"{self._name}.{number}", step)
            for gradients, parts, message, place in started:
                answers = place((yield message), parts)
                for gradient, some in zip(gradients, answers):
                    gradient.go_on(some)
            if quantized:
                yield from self._average_quantized(quantized, f"{self._name}.{number}.quantized", step)
        return [gradient.finite() for gradient in dense]

    def _average_quantized(self, gradients: Sequence[GeneratorGradient], name: str, step: Step):
        """Averages what these ask for, in 8 bits a number."""
        parts = [gradient.parts()[0] for gradient in gradients]
        rows = tuple(itertools.chain(*(_rows_of(gradient, part) for gradient, part in zip(gradients, parts))))
        flat = joined([part.reshape(-1) for part in parts])
        mean, own = yield from quantized_mean(flat, rows, name, Senders(step, self._config))
        sizes = [part.numel() for part in parts]
        for gradient, part, *both in zip(gradients, parts, mean.split(sizes), own.split(sizes)):
            gradient.go_on([some.view(part.shape) for some in both])

    def _start(self, asking: Sequence[GeneratorGradient], name: str, step: Step) -> list[tuple]:
        """Starts a round's messages: for each its gradients, their parts, what to wait for, and what takes it apart."""
        means: dict[torch.dtype, list[GeneratorGradient]] = defaultdict(list)
        gathers = []
        for gradient in asking:
            if isinstance(gradient.request, AllreduceMean):
                means[gradient.request.tensors.dtype].append(gradient)
            else:
                gathers.append(gradient)
        started: list[tuple] = []
        for dtype, gradients in means.items():
            parts = [gradient.parts() for gradient in gradients]
            flat = torch.cat([part.reshape(-1) for some in parts for part in some])
            step.count(flat.nbytes, flat.nbytes)
            started.append((gradients, parts, self._workers.mean(flat, f"{name}.{dtype}", in_place=True), _split_mean))
        if gathers:
            parts = [gradient.parts() for gradient in gathers]
            packed = torch.cat([_bytes_of(part) for some in parts for part in some])
            step.count(packed.nbytes, packed.nbytes * self._workers.count)
            gathered = self._workers.gather(packed, f"{name}.gather", step.parity, self._config)
            started.append((gathers, parts, gathered, _split_gathered))
        return started


def _rows_of(gradient: GeneratorGradient, part: torch.Tensor) -> list[tuple[int, int]]:
    assert isinstance(gradient.request, QuantizedMean)
    return rows_of(part.shape, gradient.request.row)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _split_mean(flat: torch.Tensor, parts: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The means, in the shapes of what was sent."""
    split = iter(flat.split([part.numel() for some in parts for part in some]))
    return [[next(split).view(part.shape) for part in some] for some in parts]


def _split_gathered(packed: torch.Tensor, parts: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """All workers' parts, (W, ...), out of (W, bytes)."""
    split = iter(packed.split([part.nbytes for some in parts for part in some], dim=1))
    # A part's bytes may begin where no number of its dtype can.
    aligned = (part.clone(memory_format=torch.contiguous_format) for part in split)
    return [[next(aligned).view(part.dtype).view(-1, *part.shape) for part in some] for some in parts]
