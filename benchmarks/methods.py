"""The ways of exchanging gradients that are compared."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A way of exchanging gradients.

    Attributes:
        title: in tables and figures.
        library: "horovod", "ours" (this package), "ddp" (PyTorch's DistributedDataParallel) or None: no exchange.
        compression: "none", "fp16" or "powersgd".
        rank, half_steps: PowerSGD's rank and num_iters_per_step.
    """

    title: str
    library: str | None
    compression: str = "none"
    rank: int = 0
    half_steps: int = 2

    @property
    def uses_horovod(self):
        return self.library in ("horovod", "ours")

    @property
    def numbers_ratio(self):
        """How many times fewer bytes are sent, where that does not depend on the tensors; None where it does."""
        return {"none": 1, "fp16": 2, "powersgd": None}[self.compression]

    def bytes_sent(self, nbytes, stats):
        """What a worker hands to allreduce in a step, on average; None where the method does not say.

        Args:
            nbytes: of the gradients.
            stats: a function that gives this package's statistics.
        """
        if self.library is None:
            return 0
        if self.library == "ours":
            return round(stats().total_bytes_sent / stats().steps)
        return None if self.numbers_ratio is None else nbytes // self.numbers_ratio


METHODS = {
    "no-exchange": Method("no exchange", None),
    "hvd": Method("Horovod", "horovod"),
    "hvd-fp16": Method("Horovod, fp16", "horovod", "fp16"),
    "ddp": Method("DDP", "ddp"),
    "ddp-fp16": Method("DDP, fp16", "ddp", "fp16"),
    "ddp-rank-4": Method("DDP, PowerSGD rank 4", "ddp", "powersgd", rank=4),
    "rank-4": Method("PowerSGD rank 4", "ours", "powersgd", rank=4),
    "rank-4-alternating": Method("PowerSGD rank 4, one half-step", "ours", "powersgd", rank=4, half_steps=1),
    "rank-1": Method("PowerSGD rank 1", "ours", "powersgd", rank=1),
    "rank-2": Method("PowerSGD rank 2", "ours", "powersgd", rank=2),
    "rank-32": Method("PowerSGD rank 32", "ours", "powersgd", rank=32),
}
