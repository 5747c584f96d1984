"""The generation of workers: a token that is another one after each hvd.init(), which an elastic job calls when its
workers change, and after each hvd.join(). It is compared with `is`: who has agreed with the workers of another
generation agrees again before it exchanges.
"""

from horovod.torch import mpi_ops

# What Horovod makes anew in init.
_current = [mpi_ops._handle_map]


def generation() -> object:
    """The token."""
    global _current
    if _current[0] is not mpi_ops._handle_map:
        _current = [mpi_ops._handle_map]
    return _current


def join(device: int = -1) -> int:
    """horovod.torch.join; the next exchange starts from what the worker with the most completed steps knows."""
    global _current
    last = mpi_ops.join(device)
    _current = [mpi_ops._handle_map]
    return last
