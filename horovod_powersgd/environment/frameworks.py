"""PyTorch and TensorFlow, as they are installed here: files are read, since importing one takes seconds."""

import re
from dataclasses import dataclass
from pathlib import Path

from horovod_powersgd.environment.packages import distribution_version, package_directory


@dataclass(frozen=True)
class Framework:
    """A framework that Horovod can be built for."""

    name: str  # of its module, and of the module inside horovod
    title: str  # as people write it
    distributions: tuple[str, ...]  # the names under which package indexes have it
    metadata_key: str  # its key in horovod/metadata.json
    extension: str  # Horovod's compiled module for it
    libraries: tuple[str, ...]  # of the framework, needed before the extension can be loaded

    def directory(self) -> Path | None:
        """The folder of the installed framework, or None."""
        return package_directory(self.name)

    def version(self) -> str | None:
        """Its version as it gives it itself (with torch's local part, as in 2.13.0+cpu), or None."""
        directory = self.directory()
        if directory is None:
            return None
        # An index's torch 2.13.0 can call itself 2.13.0+cu130, and Horovod records what torch calls itself.
        stated = directory / "version.py"
        if stated.is_file():
            match = re.search(r"^__version__\s*=\s*['\"](.+?)['\"]", stated.read_text(), re.MULTILINE)
            if match:
                return match.group(1)
        return (self._distribution() or (None, "unknown"))[1]

    def requirement(self) -> str:
        """What pip is told to get the one that is installed, as in torch==2.13.0."""
        return "==".join(self._distribution() or (self.name,))

    def _distribution(self) -> tuple[str, str] | None:
        found = ((name, distribution_version(name)) for name in self.distributions)
        return next(((name, version) for name, version in found if version is not None), None)


TORCH = Framework(
    name="torch",
    title="PyTorch",
    distributions=("torch",),
    metadata_key="pytorch",
    extension="mpi_lib_v2",
    libraries=("lib/libtorch_python.so",),
)
TENSORFLOW = Framework(
    name="tensorflow",
    title="TensorFlow",
    distributions=("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-rocm", "tf-nightly"),
    metadata_key="tensorflow",
    extension="mpi_lib",
    libraries=("libtensorflow_framework.so.2", "libtensorflow_cc.so.2"),
)
FRAMEWORKS = {framework.name: framework for framework in (TORCH, TENSORFLOW)}
