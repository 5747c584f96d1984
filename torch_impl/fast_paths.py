"""Which code exchanges the gradients of which compressor: the one place that knows of a fast path."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from horovod_powersgd.buckets import BUCKET_BYTES, GPU_BUCKET_BYTES, bucket_name, sort_into_buckets
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.compressors.precision import Int8, is_horovods_fp16
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.bucket import Bucket
from horovod_powersgd.torch.compressed_gradient import CompressedGradient
from horovod_powersgd.torch.generator_bucket import GeneratorBucket
from horovod_powersgd.torch.generator_gradient import GeneratorGradient
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.half_gradient import HalfGradient
from horovod_powersgd.torch.int8_bucket import Int8Bucket
from horovod_powersgd.torch.int8_gradient import Int8Gradient
from horovod_powersgd.torch.peers import Peers
from horovod_powersgd.torch.powersgd_bucket import PowerSGDBucket
from horovod_powersgd.torch.powersgd_gradient import PowerSGDGradient
from horovod_powersgd.torch.two_level_bucket import TwoLevelBucket
from horovod_powersgd.torch.two_level_gradient import TwoLevelGradient
from horovod_powersgd.torch.workers import Workers


class Path(NamedTuple):
    """How the compressed gradients of a compressor are exchanged.

    Attributes:
        gradient: what one of them goes through.
        bucket: what those of a bucket go through together.
    """

    gradient: type[CompressedGradient] | type[HalfGradient]
    bucket: type[Bucket]


FAST = {PowerSGD: Path(PowerSGDGradient, PowerSGDBucket), Int8: Path(Int8Gradient, Int8Bucket)}
# Of PowerSGD, where it may have two levels.
HIERARCHICAL = Path(TwoLevelGradient, PowerSGDBucket)
HALVES = Path(HalfGradient, Bucket)
GENERAL = Path(GeneratorGradient, GeneratorBucket)


def path_of(config: Compressor) -> Path:
    """The fast path of a compressor where there is one, otherwise its generator's."""
    if config.family.hierarchical:
        return HIERARCHICAL
    if is_horovods_fp16(config):
        return HALVES
    return next((path for cls, path in FAST.items() if isinstance(config.family, cls)), GENERAL)


def _is_grouped(bucket: Sequence[PlainGradient]) -> bool:
    """Whether a bucket of PowerSGD's is a GroupedBucket: on a GPU, or where Triton's interpreter stands for one."""
    device = bucket[0].parameter.device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False  # and nothing imports Triton
    from horovod_powersgd.torch import grouped_kernels

    matrices = [gradient for gradient in bucket if isinstance(gradient, CompressedGradient)]
    return grouped_kernels.serve(device, [g.dtype for g in matrices], [g.layout.amount for g in matrices])


def make_buckets(
    gradients: Sequence[PlainGradient],
    workers: Workers,
    config: Compressor,
    groups: None | int | Sequence = None,
    host: Host | None = None,
    peers: Peers | None = None,
) -> list[Bucket]:
    """Sorts gradients into buckets, the same on every worker.

    Args:
        gradients: in the order of registration.
        workers: that the buckets are exchanged with.
        config: how they are compressed.
        groups: Horovod's: their number, or lists of the parameters that belong together.
        host: this worker's, where the exchange has two levels.
        peers: the workers of that, where they can read each other's gradients.
    """
    if groups is not None and not isinstance(groups, int):
        by_parameter = {g.parameter: g for g in gradients}
        groups = [[by_parameter[p] for p in group if p in by_parameter] for group in groups]
    on_gpu = any(gradient.parameter.is_cuda for gradient in gradients)
    buckets = []
    for i, bucket in enumerate(sort_into_buckets(gradients, groups, GPU_BUCKET_BYTES if on_gpu else BUCKET_BYTES)):
        compressed = any(gradient.compressed for gradient in bucket)
        make: Callable[..., Bucket] = path_of(config).bucket if compressed else Bucket
        if make is PowerSGDBucket and host is not None:
            make = partial(TwoLevelBucket, host=host, peers=peers)
        elif make is PowerSGDBucket and _is_grouped(bucket):
            from horovod_powersgd.torch.grouped_bucket import GroupedBucket as make
        buckets.append(make(f"bucket.{bucket_name(i, bucket)}", bucket, workers, config))
    return buckets
