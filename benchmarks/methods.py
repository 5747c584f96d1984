"""The ways of exchanging gradients that are compared."""

from dataclasses import dataclass

from horovod_powersgd import Auto, Compressor, Float16, Int8, PowerSGD


@dataclass(frozen=True)
class Method:
    """A way of exchanging gradients.

    Attributes:
        title: in tables and figures.
        library: "horovod", "ours" (this package), "ddp" (PyTorch's DistributedDataParallel) or None: no exchange.
        compression: Horovod's or DDP's: "none", "fp16" or "powersgd".
        rank: of DDP's PowerSGD.
        config: this package's compressor.
        first_steps: that come before those that are timed: compressors allocate their memory, DDP's begins to compress
            in the third, and Auto tries what it has.
    """

    title: str
    library: str | None
    compression: str = "none"
    rank: int = 0
    config: Compressor | None = None
    first_steps: int = 1

    @property
    def uses_horovod(self):
        return self.library in ("horovod", "ours")

    @property
    def numbers_ratio(self):
        """How many times fewer bytes are sent, where that does not depend on the tensors; None where it does."""
        return None if self.config else {"none": 1, "fp16": 2, "powersgd": None}[self.compression]

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
    "hvd-again": Method("Horovod, once more", "horovod"),  # how much a method's time differs from its own
    "hvd-fp16": Method("Horovod, fp16", "horovod", "fp16"),
    "ddp": Method("DDP", "ddp"),
    "ddp-fp16": Method("DDP, fp16", "ddp", "fp16"),
    "ddp-rank-4": Method("DDP, PowerSGD rank 4", "ddp", "powersgd", rank=4, first_steps=4),
    "rank-4": Method("PowerSGD rank 4", "ours", config=PowerSGD(4)),
    "rank-4-alternating": Method("PowerSGD rank 4, one half-step", "ours", config=PowerSGD(4, num_iters_per_step=1)),
    "rank-4-two-levels": Method("PowerSGD rank 4, two levels", "ours", config=PowerSGD(4, hierarchical=True)),
    "rank-4-int8": Method("PowerSGD rank 4, int8", "ours", config=PowerSGD(4, wire_dtype="int8")),
    "rank-8": Method("PowerSGD rank 8", "ours", config=PowerSGD(8)),
    "rank-8-fp16": Method("PowerSGD rank 8, float16", "ours", config=PowerSGD(8, wire_dtype="float16")),
    "rank-8-int8": Method("PowerSGD rank 8, int8", "ours", config=PowerSGD(8, wire_dtype="int8")),
    "rank-8-int8-two-levels": Method(
        "PowerSGD rank 8, int8, two levels", "ours", config=PowerSGD(8, wire_dtype="int8", hierarchical=True)
    ),
    "rank-1": Method("PowerSGD rank 1", "ours", config=PowerSGD(1)),
    "rank-2": Method("PowerSGD rank 2", "ours", config=PowerSGD(2)),
    "rank-32": Method("PowerSGD rank 32", "ours", config=PowerSGD(32)),
    "int8": Method("Int8", "ours", config=Int8()),
    "auto": Method("Auto", "ours", config=Auto(Float16(error_feedback=False), PowerSGD(4)), first_steps=300),
}
