"""The passes over whole gradients, bases of small factors, and whether a few numbers are finite, compiled.

Attributes:
    compiled: the module that setup.py makes of kernels.cpp, with half_steps, products, keep, basis and finite; None
        where that was not possible when this package was installed.
    codes: the same of quantization.cpp, with encode and decode.
"""

from importlib import import_module
from typing import Any


def _module(name: str) -> Any:
    try:
        return import_module(f"horovod_powersgd.{name}")
    except ImportError:
        return None


compiled, codes = _module("_kernels"), _module("_quantization")
