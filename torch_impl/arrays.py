"""horovod_powersgd.arrays, for PyTorch's tensors.

What comes from no tensor, such as arange, is made on the CPU; what takes places brings them to its tensor's device.
"""

import torch

from horovod_powersgd.torch import orthogonalization


def reshape(x, shape):
    return x.reshape(shape)


def transpose(x):
    return x.t()


def concat(parts):
    return torch.cat(parts)


def cast(x, dtype):
    x = torch.as_tensor(x)
    return (x.float() if dtype == "float16" else x).to(getattr(torch, dtype))


def like(x, other):
    if isinstance(x, (int, float)):
        return x
    return torch.as_tensor(x).to(other.device, other.dtype)


def integers(x):
    return torch.as_tensor(x, dtype=torch.int64)


def arange(count):
    return torch.arange(count)


def shift_right(x, bits):
    return x >> bits


def where(condition, x, y):
    return torch.where(condition, x, y)


def sign(x):
    return torch.sign(x)


def max(x):
    return torch.max(x)


def power_of_two(x):
    integer, exponent = (torch.int64, 0x7FF << 52) if x.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (x.view(integer) & exponent).view(x.dtype)


def bits(x):
    return x.view(torch.int32)


def floats(x):
    return x.view(torch.float32)


def sqrt(x):
    return torch.sqrt(x)


def log(x):
    return torch.log(x)


def cos(x):
    return torch.cos(x)


def sum(x, axis=None):
    return torch.sum(x, dim=axis)


def mean(x, axis=None):
    return torch.mean(x, dim=axis)


def cumsum(x):
    return torch.cumsum(x, dim=0)


def all(x):
    return torch.all(x)


def top_k(x, k):
    return torch.topk(x, k, sorted=False)[1]


def take(x, places):
    return x[places.to(x.device)]


def scatter(size, places, values):
    total = values.new_zeros(size)
    # One worker's after the other's: places that meet are added up in the same order on every worker.
    places = places.to(values.device).reshape(-1, places.shape[-1])
    for some, theirs in zip(places, values.reshape(places.shape)):
        total.index_add_(0, some, theirs)
    return total


def pack_bits(bits):
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    return (padded.view(-1, 8) << _shifts(bits)).sum(1, dtype=torch.uint8)


def unpack_bits(packed, count):
    bits = (packed[..., None] >> _shifts(packed)) & 1
    return bits.flatten(-2)[..., :count].bool()


def _shifts(x):
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=x.device)


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def eigh(matrix):
    return torch.linalg.eigh(matrix)[1]


def orthogonalize(matrix, spare):
    """horovod_powersgd.factors.orthogonalize; `spare` is a function."""
    # Factors are kept transposed there.
    return orthogonalization.orthogonalize([matrix.t()], [lambda: spare().t().to(matrix.device)])[0].t()


def cond(condition, yes, no):
    return yes() if condition else no()


def until(done, change, x):
    while not done(x):
        x = change(x)
    return x
