"""The passes over a whole gradient, compiled.

Attributes:
    compiled: the module that setup.py makes of kernels.cpp, with half_step and product; None where that was not
        possible when this package was installed.
"""

from importlib import import_module
from typing import Any

compiled: Any
try:
    compiled = import_module("horovod_powersgd._kernels")
except ImportError:
    compiled = None
