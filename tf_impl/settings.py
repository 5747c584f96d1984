"""How gradients are exchanged."""

from dataclasses import dataclass

from horovod.tensorflow.mpi_ops import ProcessSet

from horovod_powersgd.compressors.compressor import Compressor


@dataclass(frozen=True)
class Settings:
    """How a tape or an optimizer exchanges gradients.

    Attributes:
        config: the same on every worker.
        process_set: Horovod's.
        sum_gradients: deliver the sum over the workers in place of the mean.
        predivide_factor: the part of the division by the number of workers that comes before the sum.
        sparse_as_dense: compress sparse gradients, too.
        groups: Horovod's: their number, or for each group its variables' identities.
        device: of Horovod's ops.
        device_sparse: of those for sparse gradients.
    """

    config: Compressor
    process_set: ProcessSet
    sum_gradients: bool = False
    predivide_factor: float = 1.0
    sparse_as_dense: bool = False
    groups: None | int | tuple[tuple[int, ...], ...] = None
    device: str = ""
    device_sparse: str = ""
