"""Environments made for a test: a real interpreter, and exactly the packages that the test is about."""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy

REPOSITORY = Path(__file__).parent.parent
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@dataclass
class Environment:
    """A virtual environment that has this package and numpy, and what is added to it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Environment":
        # What python -m venv makes, without waiting for it.
        python = Path(getattr(sys, "_base_executable", sys.executable))
        (folder / "venv/bin").mkdir(parents=True)
        (folder / "venv/bin/python").symlink_to(python)
        (folder / "venv/pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
        version = "{}.{}".format(*sys.version_info)
        (folder / f"venv/lib/python{version}/site-packages").mkdir(parents=True)
        environment = cls(folder)
        (environment.packages / "repository.pth").write_text(f"{REPOSITORY}\n")
        for name in ("numpy", "numpy.libs"):
            original = Path(numpy.__file__).parent.parent / name
            if original.exists():
                (environment.packages / name).symlink_to(original)
        (folder / "programs").mkdir()
        return environment

    @property
    def python(self) -> Path:
        return self.folder / "venv/bin/python"

    @property
    def packages(self) -> Path:
        return next((self.folder / "venv/lib").glob("python*/site-packages"))

    @property
    def programs(self) -> Path:
        """The only folder of PATH."""
        return self.folder / "programs"

    def add_framework(self, name: str, version: str) -> None:
        """A package that looks like a framework, as far as looking without importing goes."""
        (self.packages / name).mkdir()
        (self.packages / name / "__init__.py").touch()
        (self.packages / name / "version.py").write_text(f"__version__ = '{version}'\n")

    def add_horovod(self, **built_for: str) -> None:
        """A package that looks like Horovod built for frameworks, by name; its compiled modules do not load."""
        horovod = self.packages / "horovod"
        horovod.mkdir()
        (horovod / "__init__.py").touch()
        keys = {"torch": "pytorch", "tensorflow": "tensorflow"}
        (horovod / "metadata.json").write_text(json.dumps({keys[name]: built_for[name] for name in built_for}))
        for name, extension in {"torch": "mpi_lib_v2", "tensorflow": "mpi_lib"}.items():
            (horovod / name).mkdir()
            (horovod / name / "__init__.py").write_text(f"from horovod.{name} import {extension}\n")
            if name in built_for:
                (horovod / name / (extension + EXTENSION_SUFFIX)).write_text("not a module\n")

    def run(self, *arguments: str, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess:
        """Run its Python, with nothing of this process's environment but what is needed."""
        environment = {"PATH": str(self.programs), "HOME": str(self.folder), "LANG": "C.UTF-8", **variables}
        command = [str(self.python), *arguments]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )


def link_programs(folder: Path, names: list[str]) -> None:
    """Make a folder that can be the whole of PATH, with some of this machine's programs."""
    folder.mkdir(exist_ok=True)
    for name in names:
        found = next(Path(place) / name for place in os.get_exec_path() if (Path(place) / name).exists())
        (folder / name).symlink_to(found)
