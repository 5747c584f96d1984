"""PowerSGD gradient compression for Horovod; framework-neutral part (numpy only).

The framework modules mirror Horovod's own: horovod_powersgd.torch for horovod.torch.
"""

from pkgutil import extend_path

# Started in the repository's root, Python finds this folder before the installed package, which has the compiled
# kernels.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

from horovod_powersgd.compressors.accordion import Accordion  # after the path is set
from horovod_powersgd.compressors.auto import Auto
from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor, Traffic
from horovod_powersgd.compressors.custom import Custom
from horovod_powersgd.compressors.gradiveq import GradiVeq
from horovod_powersgd.compressors.low_rank import Atomo, BestRank, UnbiasedRank
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.compressors.precision import Float16, Int8, NoCompression
from horovod_powersgd.compressors.signs import SignNorm, Signum
from horovod_powersgd.compressors.sparsification import RandomBlock, RandomK, TopK
from horovod_powersgd.statistics import CompressionStats, TensorStats

__all__ = [
    "Accordion",
    "Allgather",
    "AllreduceMean",
    "Atomo",
    "Auto",
    "BestRank",
    "CompressionStats",
    "Compressor",
    "Custom",
    "Float16",
    "GradiVeq",
    "Int8",
    "NoCompression",
    "PowerSGD",
    "QuantizedMean",
    "RandomBlock",
    "RandomK",
    "SignNorm",
    "Signum",
    "TensorStats",
    "TopK",
    "Traffic",
    "UnbiasedRank",
]
