"""Packages and programs that are installed in this environment. None is imported or started to find it."""

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_directory(name: str) -> Path | None:
    """The folder of an installed package, or None."""
    spec = importlib.util.find_spec(name)
    # A folder that merely has the name is a namespace package, without an origin.
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def find_program(name: str) -> Path | None:
    """A program of this environment, or else of PATH: an environment need not be activated to be used."""
    folders = [str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")]
    found = next((path for folder in folders if (path := shutil.which(name, path=folder))), None) or shutil.which(name)
    return Path(found) if found else None
