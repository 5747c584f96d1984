"""The package as others install it."""

import os
import shutil
import subprocess
import sys
import sysconfig
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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package installed in it, not editable."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "results", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    return folder / "site"


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


def test_a_plain_install_works_anywhere(site, tmp_path):
    assert where(tmp_path, site) == site / "horovod_powersgd/torch/__init__.py"


def test_a_plain_install_works_in_the_repositorys_root(site):
    assert where(ROOT, site) == site / "horovod_powersgd/torch/__init__.py"


def test_an_editable_install_works_in_the_root_and_elsewhere(tmp_path):
    for folder in (ROOT, tmp_path):
        found = subprocess.run([sys.executable, "-c", SAYS_WHERE], cwd=folder, capture_output=True, text=True)
        assert Path(found.stdout.strip()) == ROOT / "torch_impl/__init__.py", found.stderr


@pytest.mark.parametrize("legacy_keras", ["0", "1"])
def test_a_script_that_imports_horovod_keras_needs_only_another_import(tmp_path, site, legacy_keras):
    assert run(KERAS_SCRIPT, tmp_path, site, TF_USE_LEGACY_KERAS=legacy_keras) == "1 1\n"


def test_the_kernels_are_compiled(site):
    assert list((site / "horovod_powersgd").glob("_kernels*.so"))


def test_typing_information_and_the_command_are_installed(site):
    assert (site / "horovod_powersgd/py.typed").exists()
    assert (site / "bin/horovod-powersgd").exists()
