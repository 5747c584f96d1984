"""Horovod's own compressions, for what Horovod alone refuses to send, or sends wrongly."""

import torch

from horovod_powersgd.torch.ownership import owns_storage


class Transported:
    """A compression of Horovod's that takes any memory format and bfloat16, and lets sparse gradients pass.

    Horovod averages in place, though backward may still need a gradient's memory for something else: then a copy is
    sent.

    Args:
        compression: hvd.Compression.none, .fp16, or what has their two functions.

    Attributes:
        incoming: what backward has handed over, while the hook runs that was called with it.
    """

    def __init__(self, compression):
        self._compression = compression
        self.incoming: torch.Tensor | None = None

    def __repr__(self):
        return getattr(self._compression, "__name__", repr(self._compression))

    def compress(self, tensor: torch.Tensor):
        """What is sent of a dense gradient, contiguous, of a dtype that Horovod reduces; and what decompress needs."""
        sent = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        compressed, context = self._compression.compress(sent.contiguous())
        if compressed is tensor and not owns_storage(tensor, self.incoming):
            compressed = tensor.clone()
        return compressed, (tensor, context)

    def decompress(self, tensor: torch.Tensor, context) -> torch.Tensor:
        """The average in the gradient's dtype and memory format."""
        if context is None:  # a sparse gradient
            return tensor
        gradient, context = context
        average = self._compression.decompress(tensor, context)
        return average if average.data_ptr() == gradient.data_ptr() else gradient.copy_(average)
