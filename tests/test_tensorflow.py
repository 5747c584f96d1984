"""TensorFlow and Keras under real Horovod: one worker without a launcher, and 2, 3 and 4 under Gloo and MPI."""

import inspect

import pytest
from job import assert_passed, checks_in, launched

import horovod_powersgd

LAUNCHES = [(None, 1), ("horovodrun --gloo", 2), ("mpirun", 3), ("horovodrun --gloo", 4)]
# Launcher, workers, whether Keras is Keras 2. Keras 3's optimizer is among the trainees of tensorflow_checks, too.
KERAS_LAUNCHES = [
    ("mpirun", 2, False),
    ("horovodrun --gloo", 3, False),
    (None, 1, True),
    ("mpirun", 3, True),
    ("horovodrun --gloo", 4, True),
]
CALLBACK_LAUNCHES = [("horovodrun --gloo", 2, False), ("mpirun", 2, True)]


@pytest.mark.parametrize("launcher, workers, check", launched("tensorflow_checks", LAUNCHES))
def test_tensorflow(launcher, workers, check):
    assert_passed("tensorflow_checks", launcher, workers, check)


@pytest.mark.parametrize("check", checks_in("tensorflow_feature_checks"))
def test_tensorflow_features(check):
    assert_passed("tensorflow_feature_checks", "mpirun", 3, check)


@pytest.mark.parametrize("launcher, workers, legacy_keras, check", launched("keras_checks", KERAS_LAUNCHES))
def test_keras(launcher, workers, legacy_keras, check):
    assert_passed("keras_checks", launcher, workers, check, legacy_keras)


@pytest.mark.parametrize(
    "launcher, workers, legacy_keras, check", launched("keras_callback_checks", CALLBACK_LAUNCHES)
)
def test_keras_callbacks(launcher, workers, legacy_keras, check):
    assert_passed("keras_callback_checks", launcher, workers, check, legacy_keras)


def arguments(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


def test_everything_that_horovod_exports_is_there_with_horovods_signatures():
    import horovod.tensorflow
    import horovod.tensorflow.keras

    import horovod_powersgd.tensorflow as hvd
    import horovod_powersgd.tensorflow.keras as hvd_keras

    for theirs, ours in ((horovod.tensorflow, hvd), (horovod.tensorflow.keras, hvd_keras)):
        exported = {name for name in vars(theirs) if not name.startswith("_")}
        assert "allreduce" in exported
        assert not {name for name in exported if not hasattr(ours, name)}
        own = {name for name in exported if getattr(ours, name) is not getattr(theirs, name)}
        assert {"DistributedOptimizer", "init"} < own
        for name in own:
            if inspect.isfunction(getattr(ours, name)):
                assert arguments(getattr(ours, name)) == arguments(getattr(theirs, name)), name
    for name in horovod_powersgd.__all__:
        assert name in ("Compressor", "Traffic") or hvd_keras.__dict__[name] is hvd.__dict__[name]
    for name in ("callbacks", "elastic"):
        for exported in (n for n in vars(getattr(horovod.tensorflow.keras, name)) if n[0].isupper()):
            assert hasattr(getattr(hvd_keras, name), exported) or exported == "K", exported
