"""TensorFlow and Keras under real Horovod: one worker without a launcher, and 2, 3 and 4 under Gloo and MPI."""

import importlib
import inspect

import numpy as np
import pytest

import horovod_powersgd
from horovod_powersgd.activation import REPLACED
from job import COMPARING, Launch, assert_passed, launched

CHECKS, FEATURES, TWO_LEVELS, AUTO, KERAS, CALLBACKS, ACTIVATED = (
    f"{name}_checks"
    for name in (
        "tensorflow", "tensorflow_feature", "tensorflow_two_level", "tensorflow_auto",
        "keras", "keras_callback", "keras_activated",
    )
)
KERAS_2, AS_BUILT = ("TF_USE_LEGACY_KERAS", "1"), ("GRAPHS", "as-built")
# Of Keras: where workers meet. One worker runs the others.
OF_TWO = COMPARING + "|algorithm_2|summed|disagree|local|loss_scaling|resumed|as_the_reference|replicas|alike_in_fit"
OF_ONE = f"check_(?!.*({OF_TWO}))|fit_equals"
# What a third worker takes part in: means that are not halves, more than one other's part, workers that are left. Two
# and four workers try two rounds.
OF_THREE = "check_(?!averages_in_two).*(" + COMPARING + ")"
THREE_MPI = OF_THREE + "|algorithm_2|mean|sum_is|predivision|sparse|disagree_are_told_in_fit|another_number"
THREE_MPI += "|process_set|join"
# Three workers decide as four do.
OF_FOUR = f"check_(?!accordion).*({COMPARING})"
ACTIVE = "PowerSGD(rank=2)"
# Keras's optimizer is among the trainees of tensorflow_checks, too.
LAUNCHES = [
    Launch(None, 1, (CHECKS,), partly=(KERAS,), pattern=OF_ONE, variables=(AS_BUILT,)),
    Launch(None, 1, partly=(KERAS,), pattern=OF_ONE, variables=(KERAS_2,)),
    Launch("horovodrun --gloo", 2, (CHECKS, AUTO, CALLBACKS, ACTIVATED), variables=(AS_BUILT,), compression=ACTIVE),
    Launch("horovodrun --gloo", 3, partly=(CHECKS, KERAS, TWO_LEVELS), pattern=OF_THREE),
    Launch("horovodrun --gloo", 4, (TWO_LEVELS,), (CHECKS, KERAS), pattern=OF_FOUR, variables=(KERAS_2, AS_BUILT)),
    Launch("mpirun", 2, (FEATURES,), (CHECKS, KERAS, TWO_LEVELS), pattern=OF_TWO, variables=(AS_BUILT,)),
    Launch("mpirun", 2, (CALLBACKS,), partly=(KERAS, AUTO), pattern=OF_TWO, variables=(KERAS_2, AS_BUILT)),
    Launch("mpirun", 3, partly=(FEATURES, CHECKS, KERAS), pattern=THREE_MPI, variables=(AS_BUILT,)),
    Launch("mpirun", 4, partly=(CHECKS, KERAS, TWO_LEVELS), pattern=OF_FOUR, variables=(AS_BUILT,)),
]


@pytest.mark.parametrize("launch, check", launched(CHECKS, LAUNCHES))
def test_tensorflow(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(FEATURES, LAUNCHES))
def test_tensorflow_features(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(TWO_LEVELS, LAUNCHES))
def test_tensorflow_in_two_levels(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(AUTO, LAUNCHES))
def test_tensorflow_chooses(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(KERAS, LAUNCHES))
def test_keras(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(CALLBACKS, LAUNCHES))
def test_keras_callbacks(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(ACTIVATED, LAUNCHES))
def test_keras_activated(launch, check):
    assert_passed(launch, check)


PACKAGES = "horovod", "horovod_powersgd"


def is_ours(exported):
    """Whether a function or class is defined in this package."""
    return getattr(exported, "__module__", "").startswith("horovod_powersgd")


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


def test_slices_that_are_cut_in_a_graph_are_the_others(monkeypatch):
    import tensorflow as tf

    from horovod_powersgd.tensorflow import quantization
    from horovod_powersgd.tensorflow.quantization import MOST_KNOWN, Slices

    for rows, workers in ((((4, 10), (1, 7)), 2), (((3, 5), (2, 100), (8, 1)), 4), (((1, 3),), 9), (((16, 19),), 4)):
        known = Slices(rows, workers, tf.float32)
        found = Slices([(tf.constant(count), length) for count, length in rows], workers, tf.float32)
        np.testing.assert_array_equal(found.segment_of, known.segment_of)
        assert (found.size, found.width) == (known.size, known.width)
        monkeypatch.setattr(quantization, "MOST_KNOWN", 0)
        np.testing.assert_array_equal(Slices(rows, workers, tf.float32).segment_of, known.segment_of)
        monkeypatch.undo()
    with tf.Graph().as_default() as graph:
        Slices(((MOST_KNOWN // 256 + 1, 256),), 2, tf.float32)
    assert graph.as_graph_def().ByteSize() < 100_000


def test_what_is_activated_takes_horovods_place_until_it_is_deactivated():
    import horovod_powersgd.tensorflow as hvd

    places = []  # (Horovod's module, ours, the names in it that are replaced)
    for root in ("horovod.tensorflow", "horovod.tensorflow.keras", "horovod.keras"):
        for submodule, names in REPLACED[root].items():
            name = f"{root}.{submodule}".rstrip(".")
            modules = [importlib.import_module(name.replace("horovod", package)) for package in PACKAGES]
            places.append((*modules, [exported for exported in names.split() if hasattr(modules[0], exported)]))
    before = [dict(vars(theirs)) for theirs, _, _ in places]
    for theirs, ours, names in places:
        own = {name for name in vars(theirs) if name[0] != "_" and is_ours(getattr(ours, name, None))}
        differing = {name for name in own if getattr(ours, name) is not getattr(theirs, name)}
        # The last is none of the elastic modules' own.
        assert differing <= {*names, "elastic", "broadcast_variables"}, theirs
    hvd.activate(compression=hvd.PowerSGD(rank=2))
    try:
        for theirs, ours, names in places:
            for name in names:
                now = getattr(theirs, name)
                assert getattr(ours, name) in (now, getattr(now, "__wrapped__", None)), (theirs, name)
    finally:
        hvd.deactivate()
    assert before == [vars(theirs) for theirs, _, _ in places]
