"""Gradients that are exchanged together."""

from typing import Dict, Generator, List, Sequence, Union

import torch

from horovod_powersgd.buckets import bucket_name, sort_into_buckets
from horovod_powersgd.torch.gradient import MatrixGradient, PlainGradient
from horovod_powersgd.torch.orthogonalization import orthogonalize
from horovod_powersgd.torch.workers import Mean, Workers


class Verdict:
    """Whether a step's averages are finite, on all workers alike; known when every bucket has said so."""

    def __init__(self, buckets: int):
        self._buckets, self._finite = buckets, []

    def add(self, finite: torch.Tensor) -> "Verdict":
        """Takes one bucket's word: a boolean, left on its device until all are there."""
        self._finite.append(finite)
        return self

    def done(self) -> bool:
        """Whether all buckets have their averages."""
        return len(self._finite) == self._buckets

    def result(self) -> bool:
        """Whether all of them are finite. The one place where the host waits for the device."""
        self._finite = [finite.cpu() for finite in self._finite]
        return all(self._finite)


class Bucket:
    """Gradients that travel in one flat tensor, of one device and one dtype on the wire."""

    def __init__(self, name: str, gradients: Sequence[PlainGradient], workers: Workers):
        self.gradients = list(gradients)
        self._name, self._workers = name, workers
        self._matrices: List[MatrixGradient] = [g for g in gradients if isinstance(g, MatrixGradient)]

    def exchange(
        self, verdict: Verdict, step: int, scale: float, half_steps: int, factor: float
    ) -> Generator[Union[PlainGradient, Mean, Verdict], object, int]:
        """reference.exchange of these gradients. Yields what it waits for.

        Args:
            verdict: of this step, shared by all its buckets.
            step: how many steps were exchanged before.
            scale: that the loss is multiplied by.
            half_steps: PowerSGD.num_iters_per_step.
            factor: that the averages are multiplied by in the end.

        Returns:
            Bytes handed to Horovod.
        """
        bytes_sent, finite, sparse = 0, True, []
        for gradient in self._matrices:
            gradient.start(step)
        bases = _bases(self._matrices)
        for half_step in range(half_steps if self._matrices else 1):
            senders, sent = [], []
            for gradient in self._matrices if half_step else self.gradients:
                if half_step == 0:
                    yield gradient
                    gradient.begin(scale)
                    if gradient.is_sparse:
                        gathered, size = gradient.send_sparse(self._workers)
                        sparse.append((gradient, gathered))
                        bytes_sent += size if self._workers.count > 1 else 0
                if not gradient.is_sparse:
                    senders.append(gradient)
                    sent.append(gradient.multiply(bases[gradient]) if gradient in bases else gradient.send())
            if not sent:
                break
            flat = torch.cat(sent) if len(sent) > 1 else sent[0]
            # This worker's last factors are still needed when the mean is there.
            in_place = not self._matrices or half_step < half_steps - 1
            mean = self._workers.mean(flat, f"{self._name}.{half_step}", in_place)
            bytes_sent += flat.nbytes if self._workers.count > 1 else 0
            flat = yield mean
            finite = torch.isfinite(flat).all() & finite
            for gradient, part in zip(senders, flat.split([part.numel() for part in sent])):
                gradient.receive(part)
            if half_step < half_steps - 1:
                bases = _bases([gradient for gradient in senders if gradient in bases])
        for gradient, gathered in sparse:
            average = yield gathered
            finite = torch.isfinite(average.values()).all() & finite
            gradient.receive_sparse(average)
        for gradient in self.gradients:
            if gradient.parameter.dtype == torch.float16:
                finite = gradient.fits(factor) & finite
        finite = yield verdict.add(finite)
        for gradient in self.gradients:
            gradient.end(finite, factor)
        return bytes_sent


def _bases(matrices: Sequence[MatrixGradient]) -> Dict[MatrixGradient, torch.Tensor]:
    """Of the factor that each was last averaged to, or starts from."""
    return dict(zip(matrices, orthogonalize([g.mean for g in matrices], [g.spare for g in matrices])))


def make_buckets(
    gradients: Sequence[PlainGradient], workers: Workers, prefix: str, groups: Union[None, int, Sequence] = None
) -> List[Bucket]:
    """Sorts gradients into buckets, the same on every worker.

    Args:
        gradients: in the order of registration.
        workers: that the buckets are exchanged with.
        prefix: of the buckets' names.
        groups: Horovod's: their number, or lists of the parameters that belong together.
    """
    if groups is not None and not isinstance(groups, int):
        by_parameter = {g.parameter: g for g in gradients}
        groups = [[by_parameter[p] for p in group if p in by_parameter] for group in groups]
    buckets = enumerate(sort_into_buckets(gradients, groups))
    return [Bucket(f"{prefix}.{bucket_name(i, bucket)}", bucket, workers) for i, bucket in buckets]
