"""Horovod's own compressions, for what Horovod alone refuses to send."""

import torch


class Transported:
    """A compression of Horovod's that takes any memory format and bfloat16, and lets sparse gradients pass.

    Args:
        compression: hvd.Compression.none, .fp16, or what has their two functions.
    """

    def __init__(self, compression):
        self._compression = compression

    def __repr__(self):
        return getattr(self._compression, "__name__", repr(self._compression))

    def compress(self, tensor: torch.Tensor):
        """What is sent of a dense gradient, contiguous, of a dtype that Horovod reduces; and what decompress needs."""
        sent = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        compressed, context = self._compression.compress(sent.contiguous())
        return compressed, (tensor, context)

    def decompress(self, tensor: torch.Tensor, context) -> torch.Tensor:
        """The average in the gradient's dtype and memory format."""
        if context is None:  # a sparse gradient
            return tensor
        gradient, context = context
        average = self._compression.decompress(tensor, context)
        if average.dtype == gradient.dtype and average.stride() == gradient.stride():
            return average
        return torch.empty_like(gradient).copy_(average)
