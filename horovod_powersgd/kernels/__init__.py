"""The passes over a whole gradient, compiled.

Attributes:
    compiled: the module that setup.py makes of kernels.cpp, with half_step and product; None where that was not
        possible when this package was installed.
"""

try:
    from horovod_powersgd import _kernels as compiled
except ImportError:
    compiled = None
