"""The configuration."""

import dataclasses

import numpy as np
import pytest

from horovod_powersgd import PowerSGD
from horovod_powersgd.layout import layout_of


def test_defaults():
    assert PowerSGD() == PowerSGD(
        rank=4,
        min_compression_rate=2.0,
        num_iters_per_step=2,
        warmup_steps=0,
        warm_start=True,
        error_feedback=True,
        wire_dtype=None,
        seed=0,
        memory_dtype=None,
    )


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PowerSGD().rank = 2


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("rank", 0, ValueError),
        ("rank", 1.5, TypeError),
        ("rank", True, TypeError),
        ("rank", "4", TypeError),
        ("min_compression_rate", -1, ValueError),
        ("min_compression_rate", float("nan"), ValueError),
        ("min_compression_rate", float("inf"), ValueError),
        ("min_compression_rate", None, TypeError),
        ("min_compression_rate", True, TypeError),
        ("num_iters_per_step", 0, ValueError),
        ("num_iters_per_step", 2.0, TypeError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", None, TypeError),
        ("warm_start", 1, TypeError),
        ("error_feedback", None, TypeError),
        ("wire_dtype", "bfloat16", ValueError),
        ("wire_dtype", "int4", ValueError),
        ("wire_dtype", np.float16, TypeError),
        ("memory_dtype", "int8", ValueError),
        ("memory_dtype", np.float16, TypeError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field, value, error):
    with pytest.raises(error) as caught:
        PowerSGD(**{field: value})
    assert field in str(caught.value) and repr(value) in str(caught.value) and "must be" in str(caught.value)


def test_numpy_numbers_are_numbers():
    assert PowerSGD(rank=np.int64(2), min_compression_rate=np.float32(3)).rank == 2


@pytest.mark.parametrize(
    "shape, config, matrix_shape, rank, reason",
    [
        ((), PowerSGD(), None, 0, "a scalar"),
        ((7,), PowerSGD(), None, 0, "a vector"),
        ((0, 7), PowerSGD(), (0, 7), 0, "empty"),
        ((64, 64), PowerSGD(rank=4), (64, 64), 4, None),
        ((64, 32, 3, 3), PowerSGD(rank=4), (64, 288), 4, None),
        ((16, 16), PowerSGD(rank=4), (16, 16), 4, None),  # shrinks exactly twice
        ((15, 16), PowerSGD(rank=4), (15, 16), 0, "would shrink 1.94 times, below min_compression_rate=2.0"),
        ((1, 100), PowerSGD(), (1, 100), 0, "would shrink 0.99 times, below min_compression_rate=2.0"),
        ((1, 100), PowerSGD(min_compression_rate=0), (1, 100), 1, None),
        ((3, 100), PowerSGD(rank=50, min_compression_rate=0), (3, 100), 3, None),
    ],
)
def test_which_tensors_are_compressed(shape, config, matrix_shape, rank, reason):
    layout = layout_of(shape, config)
    assert (layout.shape, layout.matrix_shape, layout.amount, layout.reason) == (shape, matrix_shape, rank, reason)
    assert layout.compressed is (reason is None)
