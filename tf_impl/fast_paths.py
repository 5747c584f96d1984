"""Which code exchanges the gradients of which compressor: the one place that knows of a fast path."""

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.tensorflow.compressed_gradient import CompressedGradient
from horovod_powersgd.tensorflow.generator_gradient import GeneratorGradient
from horovod_powersgd.tensorflow.powersgd_gradient import PowerSGDGradient
from horovod_powersgd.tensorflow.two_level_gradient import TwoLevelGradient

FAST = {PowerSGD: PowerSGDGradient}


def gradient_class_of(config: Compressor) -> type[CompressedGradient]:
    """What a compressed gradient of this compressor goes through: the fast path where there is one, otherwise the
    compressor's generator."""
    if config.family.hierarchical:
        return TwoLevelGradient
    return next((path for cls, path in FAST.items() if isinstance(config.family, cls)), GeneratorGradient)
