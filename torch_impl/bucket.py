"""Gradients that are exchanged together."""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Dict, Generator, List, Mapping, Sequence, Tuple, Union

import torch

from horovod_powersgd.buckets import bucket_name, sort_into_buckets
from horovod_powersgd.compressors.compressor import AllreduceMean, Compressor
from horovod_powersgd.torch.compressed_gradient import CompressedGradient
from horovod_powersgd.torch.gradient import MatrixGradient, PlainGradient
from horovod_powersgd.torch.orthogonalization import orthogonalize
from horovod_powersgd.torch.workers import Mean, SparseMean, Workers


class Verdict:
    """Whether a step's averages are finite, on all workers alike; known when every bucket has said so.

    Attributes:
        called_for: whether the step is to end: until then, the gradients are left alone.
    """

    def __init__(self, buckets: int):
        self._buckets, self._finite, self.called_for = buckets, [], False

    def add(self, finite: torch.Tensor) -> "Verdict":
        """Takes one bucket's word: a boolean, left on its device until all are there."""
        self._finite.append(finite)
        return self

    def done(self) -> bool:
        """Whether all buckets have their averages, and the step is to end."""
        return self.called_for and len(self._finite) == self._buckets

    def result(self) -> bool:
        """Whether all of them are finite. The host waits for the device here, and where Accordion compares norms."""
        self._finite = [finite.cpu() for finite in self._finite]
        return all(self._finite)


@dataclass
class Step:
    """One step of all buckets.

    Attributes:
        number: how many steps were exchanged before.
        turn: changes with every attempt at a step.
        scale: that the loss is multiplied by.
        factor: that the averages are multiplied by in the end.
        rates: learning rates, where they are known.
        verdict: shared by all buckets.
        workers: that take part.
        undoable: whether the step may still be discarded when it has ended.
        sent: bytes handed to Horovod.
        received: bytes handed back.
    """

    number: int
    turn: bool
    scale: float
    factor: float
    rates: Mapping[torch.nn.Parameter, float]
    verdict: Verdict
    workers: Workers
    undoable: bool = False
    sent: int = 0
    received: int = 0

    def count(self, sent: int, received: int) -> None:
        """Counts a message's bytes."""
        if self.workers.count > 1:
            self.sent += sent
            self.received += received


class Bucket:
    """Gradients that travel together, of one device and one dtype on the wire: as they are, or as PowerSGD's factors,
    in one flat tensor."""

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers, config: Compressor):
        self.gradients = list(gradients)
        self._name, self._workers, self._config = name, workers, config

    def exchange(self, step: Step) -> Generator[Union[PlainGradient, Mean, Verdict], object, None]:
        """reference.exchange of these gradients. Yields what it waits for."""
        sparse: Dict[PlainGradient, SparseMean] = {}
        finite = yield from self._rounds(step, sparse)
        for gradient, gathered in sparse.items():
            average = yield gathered
            step.count(0, gathered.nbytes)
            finite = torch.isfinite(average.values()).all() & finite
            gradient.receive_sparse(average)
        for gradient in self.gradients:
            if gradient.parameter.dtype == torch.float16:
                finite = gradient.fits(step.factor) & finite
        finite = yield step.verdict.add(finite)
        for gradient in self.gradients:
            gradient.end(finite, step.factor, step.undoable)

    def _begin(self, gradient: PlainGradient, step: Step, sparse: Dict[PlainGradient, SparseMean]):
        """Waits for a gradient; starts averaging it where it is sparse, and notes that."""
        yield gradient
        gradient.begin(step.scale)
        if gradient.is_sparse:
            sparse[gradient], nbytes = gradient.send_sparse(self._workers, step.turn)
            step.count(nbytes, 0)

    def _rounds(self, step: Step, sparse: Dict[PlainGradient, SparseMean]):
        """Averages all gradients but the sparse ones; returns whether the averages are finite, on the device."""
        finite = True
        matrices = [gradient for gradient in self.gradients if isinstance(gradient, MatrixGradient)]
        half_steps = 1
        if matrices:
            renews = self._config.family.renews(step.number)
            half_steps = self._config.family.half_steps(renews)
            for gradient in matrices:
                gradient.start(step.number, renews, step.rates.get(gradient.parameter))
        bases = _bases(matrices)
        for half_step in range(half_steps):
            senders, sent = [], []
            for gradient in matrices if half_step else self.gradients:
                if half_step == 0:
                    yield from self._begin(gradient, step, sparse)
                if gradient not in sparse:
                    senders.append(gradient)
                    sent.append(gradient.multiply(bases[gradient]) if gradient in bases else gradient.send())
            if not sent:
                break
            flat = torch.cat(sent) if len(sent) > 1 else sent[0]
            # This worker's last factors are still needed when the mean is there.
            in_place = not matrices or half_step < half_steps - 1
            mean = self._workers.mean(flat, f"{self._name}.{half_step}", in_place)
            step.count(flat.nbytes, flat.nbytes)
            flat = yield mean
            finite = torch.isfinite(flat).all() & finite
            for gradient, part in zip(senders, flat.split([part.numel() for part in sent])):
                gradient.receive(part)
            if half_step < half_steps - 1:
                bases = _bases([gradient for gradient in senders if gradient in bases])
        return finite


class CompressedBucket(Bucket):
    """Gradients whose generators go through their rounds together: what they ask for travels in one flat tensor for
    each collective and dtype."""

    def _rounds(self, step: Step, sparse: Dict[PlainGradient, SparseMean]):
        for gradient in self.gradients:
            gradient.start(step.number, step.rates.get(gradient.parameter), self._workers)
            yield from self._begin(gradient, step, sparse)
        dense = [gradient for gradient in self.gradients if gradient not in sparse]
        for number in itertools.count():
            asking = [gradient for gradient in dense if gradient.request is not None]
            if not asking:
                break
            started = self._start(asking, f"{self._name}.{number}", step)
            for gradients, parts, message, place in started:
                answers = place((yield message), parts)
                for gradient, some in zip(gradients, answers):
                    gradient.go_on(some)
        finite = True
        for gradient in dense:
            finite = gradient.finite() & finite
        return finite

    def _start(self, asking: Sequence[CompressedGradient], name: str, step: Step) -> List[Tuple]:
        """Starts a round's messages: for each its gradients, their parts, what to wait for, and what takes it apart."""
        means, gathers = defaultdict(list), []
        for gradient in asking:
            if isinstance(gradient.request, AllreduceMean):
                means[gradient.request.tensors.dtype].append(gradient)
            else:
                gathers.append(gradient)
        started = []
        for dtype, gradients in means.items():
            parts = [gradient.parts() for gradient in gradients]
            flat = torch.cat([part.reshape(-1) for some in parts for part in some])
            step.count(flat.nbytes, flat.nbytes)
            started.append((gradients, parts, self._workers.mean(flat, f"{name}.{dtype}", in_place=True), _split_mean))
        if gathers:
            parts = [gradient.parts() for gradient in gathers]
            packed = torch.cat([_bytes_of(part) for some in parts for part in some])
            step.count(packed.nbytes, packed.nbytes * self._workers.count)
            gathered = self._workers.gather(packed, f"{name}.gather", step.turn, self._config)
            started.append((gathers, parts, gathered, _split_gathered))
        return started


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _split_mean(flat: torch.Tensor, parts: Sequence[Sequence[torch.Tensor]]) -> List[List[torch.Tensor]]:
    """The means, in the shapes of what was sent."""
    split = iter(flat.split([part.numel() for some in parts for part in some]))
    return [[next(split).view(part.shape) for part in some] for some in parts]


def _split_gathered(packed: torch.Tensor, parts: Sequence[Sequence[torch.Tensor]]) -> List[List[torch.Tensor]]:
    """All workers' parts, (W, ...), out of (W, bytes)."""
    split = iter(packed.split([part.nbytes for some in parts for part in some], dim=1))
    # A part's bytes may begin where no number of its dtype can.
    aligned = (part.clone(memory_format=torch.contiguous_format) for part in split)
    return [[next(aligned).view(part.dtype).view(-1, *part.shape) for part in some] for some in parts]


def _bases(matrices: Sequence[MatrixGradient]) -> Dict[MatrixGradient, torch.Tensor]:
    """Of the factor that each was last averaged to, or starts from."""
    return dict(zip(matrices, orthogonalize([g.mean for g in matrices], [g.spare for g in matrices])))


def make_buckets(
    gradients: Sequence[PlainGradient],
    workers: Workers,
    config: Compressor,
    groups: Union[None, int, Sequence] = None,
) -> List[Bucket]:
    """Sorts gradients into buckets, the same on every worker.

    Args:
        gradients: in the order of registration.
        workers: that the buckets are exchanged with.
        config: how they are compressed.
        groups: Horovod's: their number, or lists of the parameters that belong together.
    """
    if groups is not None and not isinstance(groups, int):
        by_parameter = {g.parameter: g for g in gradients}
        groups = [[by_parameter[p] for p in group if p in by_parameter] for group in groups]
    buckets = []
    for i, bucket in enumerate(sort_into_buckets(gradients, groups)):
        cls = CompressedBucket if isinstance(bucket[0], CompressedGradient) else Bucket
        buckets.append(cls(f"bucket.{bucket_name(i, bucket)}", bucket, workers, config))
    return buckets
