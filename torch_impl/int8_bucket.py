"""Gradients that are exchanged together, in 8 bits a number."""

from collections.abc import Sequence

from horovod_powersgd.torch.bucket import Bucket
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.int8_gradient import Int8Gradient
from horovod_powersgd.torch.quantization import add_from, coded_mean, slices_of
from horovod_powersgd.torch.senders import Senders
from horovod_powersgd.torch.step import Step


class Int8Bucket(Bucket):
    """Gradients whose codes travel in one message."""

    gradients: Sequence[Int8Gradient]

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        dense = yield from self._begin(self.gradients, step, sparse)
        if not dense:
            return []
        parts = [gradient.part() for gradient in dense]
        left = [part.delta for part in parts]
        rows = [pair for gradient in dense for pair in gradient.rows]
        senders = Senders(step, self._config)
        slices = slices_of(rows, senders.count, left[0])
        message, norms = slices.encoded_parts(parts)
        mean = yield from coded_mean(slices, message, self._name, senders)
        add_from(left, mean.first, mean.more, -1)
        writers = slices.writers(mean.messages, mean.divisor, [len(delta) for delta in left])
        for gradient, norm, write in zip(dense, norms, writers):
            gradient.take(norm, write)
        return [slices.finite(mean.messages, mean.divisor)]
