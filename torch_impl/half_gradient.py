"""A gradient that is averaged in half precision, as Horovod's Compression.fp16 does: Float16 without error feedback."""

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.layout import Layout
from horovod_powersgd.torch.gradient import PlainGradient


class HalfGradient(PlainGradient):
    """A PlainGradient that travels in half precision."""

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, layout: Layout, config: Compressor, sparse_as_dense: bool
    ):
        super().__init__(name, parameter, layout, sparse_as_dense)

    @property
    def sent_dtype(self) -> torch.dtype:
        return torch.float16
