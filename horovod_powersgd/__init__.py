"""PowerSGD gradient compression for Horovod; framework-neutral part (numpy only).

The framework modules mirror Horovod's own: horovod_powersgd.torch for horovod.torch.
"""

from pkgutil import extend_path

# Started in the repository's root, Python finds this folder before the installed package: let it see the
# framework modules of the installed one, which have another name in the repository.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

from horovod_powersgd.powersgd import PowerSGD  # noqa: E402  (after the path is set)

__all__ = ["PowerSGD"]
