"""The package as others install it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAYS_WHERE = "import horovod_powersgd, horovod_powersgd.torch as hvd; print(hvd.__file__); hvd.PowerSGD()"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package installed in it, not editable."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "results", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    return folder / "site"


def where(folder, site):
    # Without site's .pth files the editable install of this environment is not seen.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), sysconfig.get_path("purelib")])}
    command = [sys.executable, "-S", "-c", SAYS_WHERE]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return Path(found.stdout.strip())


def test_a_plain_install_works_anywhere(site, tmp_path):
    assert where(tmp_path, site) == site / "horovod_powersgd/torch/__init__.py"


def test_a_plain_install_works_in_the_repositorys_root(site):
    assert where(ROOT, site) == site / "horovod_powersgd/torch/__init__.py"


def test_an_editable_install_works_in_the_root_and_elsewhere(tmp_path):
    for folder in (ROOT, tmp_path):
        found = subprocess.run([sys.executable, "-c", SAYS_WHERE], cwd=folder, capture_output=True, text=True)
        assert Path(found.stdout.strip()) == ROOT / "torch_impl/__init__.py", found.stderr


def test_the_kernels_are_compiled(site):
    assert list((site / "horovod_powersgd").glob("_kernels*.so"))


def test_typing_information_and_the_command_are_installed(site):
    assert (site / "horovod_powersgd/py.typed").exists()
    assert (site / "bin/horovod-powersgd").exists()
