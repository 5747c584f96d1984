"""XLA, which cannot compile Horovod's operations."""

import functools

from horovod_powersgd.tensorflow.keras.loss_scaling import aggregation_inside


def interpret_distributed_models(cls) -> None:
    """Lets models with a distributed optimizer answer jit_compile="auto" with no; with a GPU Keras 3 would say yes."""
    original = cls._resolve_auto_jit_compile

    @functools.wraps(original)
    def resolve(self):
        optimizer = getattr(self, "optimizer", None)
        distributed = hasattr(optimizer, "_aggregation") or aggregation_inside(optimizer) is not None
        return False if distributed else original(self)

    cls._resolve_auto_jit_compile = resolve
