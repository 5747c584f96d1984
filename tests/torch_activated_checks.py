"""Code that imports Horovod itself, and before this package, in workers that `python -m horovod_powersgd run` has
started."""

import horovod.torch
import pytest

import horovod_powersgd.torch as hvd
from horovod_powersgd import PowerSGD, TopK
from horovod_torch_training import train

RUN_WITH = PowerSGD(rank=2)


def assert_compresses(model, optimizer, compressor):
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert optimizer.compression_stats().bytes_sent == compressor.traffic(shapes, hvd.size()).sent


def check_a_training_that_imports_horovod_equals_one_that_imports_this_package():
    model, optimizer = train()
    assert_compresses(model, optimizer, RUN_WITH)
    assert optimizer.compression_stats().ratio > 10
    hvd.assert_replicas_equal(model)
    ours, _ = train(hvd, compression=RUN_WITH)
    largest = max((p - q).abs().max() for p, q in zip(model.parameters(), ours.parameters()))
    assert largest < 1e-5  # sums of three numbers depend on their order


def check_a_compression_that_is_given_is_kept_with_a_word():
    with pytest.warns(UserWarning, match=r"NoneCompressor'>, and keeps it. To have PowerSGD\(rank=2"):
        _, optimizer = train(compression=hvd.Compression.none)
    assert not hasattr(optimizer, "compression_stats")
    assert_compresses(*train(compression=TopK(0.1)), TopK(0.1))


def check_optimizers_have_what_is_active_when_they_are_made():
    hvd.deactivate()
    _, optimizer = train()
    assert not hasattr(optimizer, "compression_stats")
    for compressor in (TopK(0.1), RUN_WITH):
        hvd.activate(compression=compressor)
        assert_compresses(*train(), compressor)
    assert isinstance(horovod.torch.elastic.TorchState(optimizer=optimizer), hvd.elastic.TorchState)
