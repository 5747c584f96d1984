"""The package as others install it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERAS_SCRIPT = """
import tensorflow as tf, numpy as np
import horovod.keras, horovod_powersgd.tensorflow.keras
import horovod_powersgd.keras as hvd
from horovod_powersgd.keras.callbacks import BroadcastGlobalVariablesCallback

for theirs, ours in (
    (horovod.keras, hvd), (horovod.keras.callbacks, hvd.callbacks), (horovod.keras.elastic, hvd.elastic)
):
    assert ours.__name__.startswith("horovod_powersgd.keras"), ours
    lacking = {name for name in dir(theirs) if not name.startswith("_") and not hasattr(ours, name)}
    assert lacking <= {"K", "keras"}, lacking
assert hvd.DistributedOptimizer is horovod_powersgd.tensorflow.keras.DistributedOptimizer

hvd.init()
model = tf.keras.Sequential([tf.keras.layers.Dense(8), tf.keras.layers.Dense(1)])
optimizer = hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.1), compression=hvd.PowerSGD(rank=1))
model.compile(optimizer=optimizer, loss="mse")
model.fit(np.ones((4, 8)), np.ones((4, 1)), callbacks=[BroadcastGlobalVariablesCallback(0)], verbose=0)
print(optimizer.compression_stats().steps, hvd.size())
"""
SAYS_WHERE = "import horovod_powersgd, horovod_powersgd.torch as hvd; print(hvd.__file__); hvd.PowerSGD()"


# pip has no command that makes a source distribution.
MAKE_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
# The oldest that pyproject.toml allows, or the oldest of those that Python 3.12 can run.
OLDEST_SETUPTOOLS = "setuptools==64.0.0" if sys.version_info < (3, 12) else "setuptools==66.1.0"


@pytest.fixture(scope="module")
def pip_install(tmp_path_factory):
    """Installs into a folder what pip is given. Kernels need not be fast, and are compiled in a tenth of the time."""
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    drops_optimization = 'for word; do shift; [ "$word" = -O3 ] || set -- "$@" "$word"; done'
    compiler.write_text(f'#!/bin/sh\n{drops_optimization}\nexec {sysconfig.get_config_var("CXX")} "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": str(compiler), "CXX": str(compiler)}

    def install(folder, *options):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *options]
        subprocess.run(command, env=environment, check=True)

    return install


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the repository holds, links as links, without anything that was built."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.so", "build", "dist",
                                     "results", "shared", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module", params=[OLDEST_SETUPTOOLS, "setuptools"])
def sdist(request, checkout, pip_install, tmp_path_factory):
    """A source distribution that this setuptools made."""
    folder = tmp_path_factory.mktemp("sdist")
    pip_install(folder / "tools", "--no-deps", request.param)
    shutil.copytree(checkout, folder / "source", symlinks=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "tools")}
    command = [sys.executable, "-c", MAKE_SDIST, str(folder)]
    made = subprocess.run(command, cwd=folder / "source", env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def site(checkout, pip_install, tmp_path_factory):
    """A folder with the package installed in it, not editable."""
    folder = tmp_path_factory.mktemp("site")
    # pip builds in the folder that it is given.
    shutil.copytree(checkout, folder / "source", symlinks=True)
    pip_install(folder / "site", "--no-deps", "--no-build-isolation", str(folder / "source"))
    return folder / "site"


def files_under(folder, follow_links=False):
    """All files, by their paths from there."""
    found = []
    for place, _, names in os.walk(folder, followlinks=follow_links):
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
    return set(found)


def run(program, folder, site, **variables):
    # Without site's .pth files the editable install of this environment is not seen.
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    command = [sys.executable, "-S", "-c", program]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def where(folder, site):
    return Path(run(SAYS_WHERE, folder, site).strip())


def test_a_source_distribution_holds_real_files_and_all_of_them(sdist, checkout):
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if not member.isdir()]
    assert all(member.isfile() for member in members)
    held = {member.name.partition("/")[2] for member in members}
    # There the links are folders.
    wanted = {name for name in files_under(checkout, True) if not name.startswith(("torch_impl/", "tf_impl/"))}
    wanted = {name for name in wanted if not name.startswith("horovod_powersgd/tensorflow/standalone_keras/")}
    assert wanted <= held, sorted(wanted - held)


@pytest.mark.parametrize("sdist", [OLDEST_SETUPTOOLS], indirect=True)
def test_what_a_source_distribution_installs_is_what_the_repository_installs(sdist, site, pip_install, tmp_path):
    pip_install(tmp_path / "site", "--no-deps", str(sdist))
    package = "horovod_powersgd"
    assert files_under(tmp_path / "site" / package) == files_under(site / package)


def test_what_a_package_index_shows_has_no_links_that_lead_nowhere(site):
    [metadata] = site.glob("horovod_powersgd-*.dist-info/METADATA")
    description = metadata.read_text()
    assert "PowerSGD gradient compression" in description and "docs/evidence.md" in description
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", description) == []


def test_a_plain_install_works_anywhere(site, tmp_path):
    assert where(tmp_path, site) == site / "horovod_powersgd/torch/__init__.py"


def test_in_the_repositorys_root_its_files_are_used_with_the_installed_kernels(site, checkout):
    assert where(checkout, site).samefile(checkout / "torch_impl/__init__.py")
    program = "from horovod_powersgd import _kernels; print(_kernels.__file__)"
    assert Path(run(program, checkout, site).strip()).parent == site / "horovod_powersgd"


def test_an_editable_install_works_in_the_root_and_elsewhere(tmp_path):
    for folder in (ROOT, tmp_path):
        found = subprocess.run([sys.executable, "-c", SAYS_WHERE], cwd=folder, capture_output=True, text=True)
        assert Path(found.stdout.strip()).samefile(ROOT / "horovod_powersgd/torch/__init__.py"), found.stderr


@pytest.mark.parametrize("legacy_keras", ["0", "1"])
def test_a_script_that_imports_horovod_keras_needs_only_another_import(tmp_path, site, legacy_keras):
    assert run(KERAS_SCRIPT, tmp_path, site, TF_USE_LEGACY_KERAS=legacy_keras) == "1 1\n"


def test_the_kernels_are_compiled(site):
    for name in ("_kernels", "_quantization"):
        assert list((site / "horovod_powersgd").glob(f"{name}*.so"))


def test_typing_information_and_the_command_are_installed(site):
    assert (site / "horovod_powersgd/py.typed").exists()
    assert (site / "bin/horovod-powersgd").exists()
