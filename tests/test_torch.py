"""PyTorch under real Horovod: one worker without a launcher, and 2, 3 and 4 under Gloo and MPI; and what users do."""

import sys
from pathlib import Path

import pytest

from horovod_powersgd.activation import REPLACED
from job import COMPARING, Launch, assert_passed, launched

CHECKS, FEATURES = "torch_checks", ("torch_feature_checks", "torch_practice_checks")
TWO_LEVELS, ACTIVATED, AUTO = "torch_two_level_checks", "torch_activated_checks", "torch_auto_checks"
# What a third worker, or MPI, takes part in: who waits for whom, and who is named.
OF_THREE = COMPARING + "|worker|algorithm_2|sparse|join|process_set|order|broadcast|line_search|closure|is_lost"
LAUNCHES = [
    Launch(None, 1, (CHECKS,)),
    Launch("horovodrun --gloo", 2, (CHECKS, *FEATURES, TWO_LEVELS, AUTO)),
    Launch(
        "horovodrun --gloo",
        3,
        (ACTIVATED,),
        partly=(CHECKS,),
        variables=(("HOROVOD_FUSION_THRESHOLD", "0"),),
        compression="PowerSGD(rank=2)",
    ),
    Launch("horovodrun --gloo", 4, (TWO_LEVELS,), partly=(CHECKS,)),
    Launch("mpirun", 2, (CHECKS,)),
    Launch("mpirun", 3, (CHECKS,), partly=(*FEATURES, TWO_LEVELS, AUTO), pattern=OF_THREE),
    Launch("mpirun", 4, partly=(CHECKS, TWO_LEVELS)),
    Launch("mpirun", 6, partly=(TWO_LEVELS,)),
]


@pytest.mark.parametrize("launch, check", launched("torch_checks", LAUNCHES))
def test_torch(launch, check):
    assert_passed(launch, check)


TRITON = Path(sys.prefix) / "triton"
GROUPED = Launch(None, 1, ("torch_grouped_checks",), variables=(("TRITON_INTERPRET", "1"),))


@pytest.mark.skipif(not TRITON.exists(), reason=f"Triton is not in {TRITON}: .ci/setup puts it there")
@pytest.mark.parametrize("launch, check", launched("torch_grouped_checks", [GROUPED]))
def test_torch_grouped(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched("torch_feature_checks", LAUNCHES))
def test_torch_features(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(TWO_LEVELS, LAUNCHES))
def test_torch_in_two_levels(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(AUTO, LAUNCHES))
def test_torch_auto(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched("torch_practice_checks", LAUNCHES))
def test_torch_practice(launch, check):
    assert_passed(launch, check)


@pytest.mark.parametrize("launch, check", launched(ACTIVATED, LAUNCHES))
def test_torch_activated(launch, check):
    assert_passed(launch, check)


def test_everything_that_horovod_exports_is_there():
    import horovod.torch

    import horovod_powersgd.torch as hvd

    functions = {"DistributedOptimizer", "init", "join", "broadcast_parameters", "broadcast_optimizer_state"}
    # The last two refuse compressors.
    functions |= {"allreduce", "grouped_allreduce"}
    assert functions == set(REPLACED["horovod.torch"][""].split())
    ours = functions | {"elastic", "optimizer"}
    exported = {name for name in vars(horovod.torch) if not name.startswith("_")}
    assert "allreduce" in exported
    assert {name for name in exported if getattr(hvd, name, None) is not getattr(horovod.torch, name)} == ours


def test_the_signature_is_horovods():
    import inspect

    import horovod.torch

    import horovod_powersgd.torch as hvd

    def arguments(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    assert arguments(hvd.DistributedOptimizer) == arguments(horovod.torch.DistributedOptimizer)
    assert arguments(hvd.init) == arguments(horovod.torch.init)

    for name in ("broadcast_parameters", "broadcast_optimizer_state", "allreduce", "grouped_allreduce"):
        assert arguments(getattr(hvd, name)) == arguments(getattr(horovod.torch, name))


def test_elastic_state_is_ours():
    import horovod.torch

    import horovod_powersgd.torch as hvd

    assert issubclass(hvd.elastic.TorchState, horovod.torch.elastic.TorchState)
    assert hvd.elastic.TorchState is not horovod.torch.elastic.TorchState
    assert hvd.elastic.run is horovod.torch.elastic.run


def test_what_is_activated_takes_horovods_place_until_it_is_deactivated():
    import horovod.torch

    import horovod_powersgd.torch as hvd

    before = dict(vars(horovod.torch)), dict(vars(horovod.torch.elastic))
    hvd.activate(compression=hvd.PowerSGD(rank=1))
    hvd.activate(compression=hvd.PowerSGD(rank=2))  # in the place of the first
    try:
        assert horovod.torch.DistributedOptimizer.__wrapped__ is hvd.DistributedOptimizer
        for name in REPLACED["horovod.torch"][""].split():
            assert getattr(horovod.torch, name) is not before[0][name], name
        assert horovod.torch.elastic.TorchState is hvd.elastic.TorchState
    finally:
        hvd.deactivate()
    assert before == (vars(horovod.torch), vars(horovod.torch.elastic))
    hvd.deactivate()  # does nothing more
    with pytest.raises(TypeError, match="compression must be a compressor"):
        hvd.activate(compression="PowerSGD")
