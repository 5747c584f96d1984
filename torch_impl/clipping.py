"""How much of an update is left when its step is taken."""

from collections.abc import Sequence

import torch

# So many rows of a matrix tell it: those of the largest entries.
ROWS = 8


class Sample:
    """A few rows of a matrix's update, as they were when the exchange had ended.

    Args:
        rows: (k,) int64: where they are.
        values: (k, m).
    """

    def __init__(self, rows: torch.Tensor, values: torch.Tensor):
        self._rows, self._values = rows, values

    @classmethod
    def of_product(cls, p: torch.Tensor, q: torch.Tensor) -> "Sample":
        """Of P^T Q; P (r, n) and Q (r, m) are kept transposed."""
        rows = _largest(p.square().sum(0))
        return cls(rows, p.index_select(1, rows).t() @ q)

    @classmethod
    def of_matrix(cls, update: torch.Tensor) -> "Sample":
        """Of an update (n, m)."""
        rows = _largest(update.square().sum(1))
        return cls(rows, update.index_select(0, rows))

    def factor(self, update: torch.Tensor) -> torch.Tensor:
        """What the update, (n, m), has been multiplied by since then, float64: that of the row that kept the most, 0 or
        more; masks and the like are no clipping. 1 where the rows are zero."""
        before, now = self._values.double(), update.index_select(0, self._rows).double()
        norms = before.square().sum(1)
        factors = torch.where(norms > 0, (before * now).sum(1) / norms, 0).amax().clamp(min=0)
        return torch.where((norms > 0).any(), factors, 1.0)


def _largest(norms: torch.Tensor) -> torch.Tensor:
    return torch.topk(norms, min(ROWS, len(norms)), sorted=False).indices


def factors_of(samples: Sequence[tuple[Sample, torch.Tensor]]) -> Sequence[float]:
    """The factors of samples and what has become of their updates. The host waits for the device."""
    if not samples:
        return []
    return torch.stack([sample.factor(update).cpu() for sample, update in samples]).tolist()
