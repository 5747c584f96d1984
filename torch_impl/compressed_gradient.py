"""What compressed gradients have in common: what is kept of one from step to step, and who commits it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from horovod_powersgd.clipping import after_clipping
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import RowShare
from horovod_powersgd.layout import Layout
from horovod_powersgd.randomness import key_of
from horovod_powersgd.torch.accordion import AccordionState
from horovod_powersgd.torch.clipping import Sample
from horovod_powersgd.torch.gradient import PlainGradient


class CompressedGradient(PlainGradient):
    """A gradient that travels compressed: something is kept of it from step to step, a Kept of its own kind.

    Attributes:
        accordion: Accordion's part.
    """

    compressed = True

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, layout: Layout, config: Compressor, sparse_as_dense: bool
    ):
        super().__init__(name, parameter, layout, sparse_as_dense)
        self.accordion = AccordionState(config, layout)
        self._matrix_shape = layout.matrix
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self._key = key_of(name, config.seed)
        # What is kept; and what takes its place when the step is taken, there between end and commit or discard.
        self._kept: Any = None
        self._next: Any = None
        self._sample: Sample | None = None
        self._usual_clipping: float | None = None

    def _mixed(self, old, new, weight: float):
        """The new one with (1 - weight) times the old memory plus `weight` times its own."""
        raise NotImplementedError

    def sample(self) -> tuple[Sample, torch.Tensor] | None:
        gradient = self.parameter.grad
        if self._next is None or self._sample is None or gradient is None or gradient.is_sparse:
            return None
        return self._sample, gradient.reshape(self._matrix_shape)

    def commit(self, clipped: float | None = None) -> None:
        if self._next is None:
            return
        weight = 1.0
        if clipped is not None and self._sample is not None:
            weight, self._usual_clipping = after_clipping(clipped, self._usual_clipping)
        kept = self._next if weight == 1 else self._mixed(self._kept, self._next, weight)
        self._kept, self._next = kept, None
        self.accordion.commit()

    def discard(self) -> None:
        self._next = None

    @property
    def memory(self) -> torch.Tensor | None:
        """(n, m); None before the first step and without error feedback."""
        raise NotImplementedError

    @property
    def memory_scale(self) -> float:
        """The loss scale that the memory is in."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            **self.shared_state(),
            "memory": None if self.memory is None else self.memory.cpu().clone(),
            "memory_scale": self.memory_scale,
            "usual_clipping": self._usual_clipping,
        }

    def shared_state(self) -> dict[str, Any]:
        """What is the same on every worker, on the CPU."""
        raise NotImplementedError

    def load_shared_state(self, state: Mapping) -> None:
        """Takes what another worker, or an earlier job, kept."""
        raise NotImplementedError

    def take_over(self, other: PlainGradient) -> None:
        assert isinstance(other, CompressedGradient)  # of the same configuration
        self._kept, self.accordion, self._usual_clipping = other._kept, other.accordion, other._usual_clipping


def sum_of_memories(memories: Sequence[Mapping], weight: float, like: torch.Tensor) -> torch.Tensor | None:
    """The sum of memories, each divided by its loss scale, times `weight`; None where there are none.

    Args:
        memories: state_dict() of gradients that have one.
        weight: a factor of the sum.
        like: the sum gets its dtype and device.
    """
    total = None
    for saved in memories:
        memory = of_all_rows(saved["memory"], saved.get("memory_share"))
        part = memory.to(like, copy=True).mul_(weight / saved["memory_scale"])
        total = part if total is None else total.add_(part)
    return total


def of_all_rows(memory: torch.Tensor, share: Sequence[int] | None) -> torch.Tensor:
    """What a worker's memory would be in an exchange of one level: so that the mean over all workers is that over the
    hosts, a share of the rows becomes as many times itself as workers share a host, and other rows zeros.

    Args:
        memory: (n, m), or the rows of a share.
        share: of n rows, a RowShare's numbers and n; None where it has all rows.
    """
    if share is None:
        return memory
    place, parts, n = share
    whole = memory.new_zeros(n, memory.shape[1])
    whole.narrow(0, *RowShare(place, parts).rows(n)).copy_(memory * parts)
    return whole
