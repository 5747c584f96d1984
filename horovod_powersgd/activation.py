"""Our names in Horovod's modules, for code that imports Horovod itself: libraries, and scripts that nobody changes."""

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from horovod_powersgd.arguments import compressor_of

_KERAS = {
    "": "DistributedOptimizer PartialDistributedOptimizer init load_model",
    "callbacks": """
        BestModelCheckpoint BroadcastGlobalVariablesCallback LearningRateScheduleCallback LearningRateWarmupCallback
        MetricAverageCallback
    """,
    "elastic": """
        CommitStateCallback KerasState TensorFlowKerasState UpdateBatchStateCallback UpdateEpochStateCallback run
    """,
}
# What is replaced by what has the same name here, in the module named after Horovod's: for each of Horovod's modules
# that code imports, names in the module itself and in its submodules. Horovod has not all of Keras's in both places.
REPLACED = {
    "horovod.torch": {
        "": """
            DistributedOptimizer allreduce broadcast_optimizer_state broadcast_parameters grouped_allreduce init join
        """,
        "elastic": "TorchState",
    },
    "horovod.tensorflow": {
        "": """
            DistributedGradientTape DistributedOptimizer PartialDistributedGradientTape SyncBatchNormalization allreduce
            broadcast_variables grouped_allreduce grouped_reducescatter init join reducescatter
        """,
        "elastic": "TensorFlowKerasState TensorFlowState run",
    },
    "horovod.tensorflow.keras": _KERAS,
    "horovod.keras": _KERAS,
}
# Those of them that compress what they are given as compression.
_COMPRESSING = {
    "DistributedGradientTape",
    "DistributedOptimizer",
    "PartialDistributedGradientTape",
    "PartialDistributedOptimizer",
    "load_model",
}


class Activation:
    """Horovod's modules for one framework, in which our names can take the place of Horovod's.

    While they do, this is one of the importers that Python asks: what code imports later is changed then.

    Args:
        modules: of REPLACED.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._compression: object = None
        # Of the modules, those whose namesakes here are there whole.
        self._ready: set[str] = set()
        # (Horovod's module, name): (what was there, what is there now)
        self._replaced: dict[tuple[ModuleType, str], tuple[object, object]] = {}

    def activate(self, compression) -> None:
        """Makes ours what Horovod's own modules export, for code that imports them: optimizers, tapes, init, join,
        broadcasts, callbacks and elastic states. Where such code gives an optimizer or a tape no compression, it has
        this one; where it gives one, it keeps that.

        Call it, on every worker, before that code is imported: what code has taken out of a module by then, as with
        `from horovod.torch import DistributedOptimizer`, stays what it is.

        Args:
            compression: a compressor such as PowerSGD(rank=4), a generator function, or one of Horovod's.

        Raises:
            TypeError: it is none of these.

        Example:
            >>> import horovod_powersgd.torch as hvd
            >>> hvd.activate(compression=hvd.PowerSGD(rank=4))
            >>> import a_library_that_imports_horovod
        """
        compressor_of(compression)
        self.deactivate()
        self._compression = compression
        sys.meta_path.insert(0, self)
        for name in self._modules:
            if name in sys.modules:
                self._bring(name)

    def deactivate(self) -> None:
        """Gives Horovod's modules back what they had. What was made in between stays as it is."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for (module, name), (before, _) in self._replaced.items():
            setattr(module, name, before)
        self._replaced.clear()

    def ready(self, namesake: str) -> None:
        """To be called at the end of each module here that is named after one of Horovod's.

        Args:
            namesake: its name.
        """
        name = namesake.replace("horovod_powersgd", "horovod", 1)
        self._ready.add(name)
        self._replace(name)

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """Python's own way to a module, with something to be done once it is loaded; None for other modules."""
        if name not in self._modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = spec and spec.loader
        if loader is not None:
            loader.exec_module = functools.partial(self._execute, loader.exec_module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        # Python does that after this; our module needs it before.
        package, _, name = module.__name__.rpartition(".")
        setattr(sys.modules[package], name, module)
        self._bring(module.__name__)

    def _bring(self, name: str) -> None:
        # If this module is being imported because ours is, it comes back at once, and ours says when it is ready.
        importlib.import_module(_namesake(name))
        self._replace(name)

    def _replace(self, name: str) -> None:
        if self not in sys.meta_path or name not in self._ready or name not in sys.modules:
            return
        for submodule, names in REPLACED[name].items():
            theirs, ours = (
                importlib.import_module(f"{package}.{submodule}" if submodule else package)
                for package in (name, _namesake(name))
            )
            for exported in names.split():
                if (theirs, exported) not in self._replaced and hasattr(theirs, exported):
                    self._put(theirs, exported, getattr(ours, exported))

    def _put(self, module: ModuleType, name: str, ours: Any) -> None:
        if name in _COMPRESSING:
            ours = _with_default(ours, self._compression)
        found = getattr(module, name)
        # It may have come from another module of Horovod's, in which ours was already.
        before = next((before for before, now in self._replaced.values() if now is found), found)
        self._replaced[module, name] = before, ours
        setattr(module, name, ours)


def _namesake(name: str) -> str:
    return name.replace("horovod", "horovod_powersgd", 1)


def _with_default(function: Callable, default) -> Callable:
    """A function that gives `compression` to one where its caller does not."""
    place = list(inspect.signature(function).parameters).index("compression")

    @functools.wraps(function)
    def compressing(*args, **kwargs):
        if len(args) <= place and "compression" not in kwargs:
            return function(*args, compression=default, **kwargs)
        given = kwargs["compression"] if "compression" in kwargs else args[place]
        if compressor_of(given) is None:
            warnings.warn(
                f"{function.__name__} was given compression={given!r}, and keeps it. To have {default!r}, which is "
                "activated, leave the argument out",
                stacklevel=2,
            )
        return function(*args, **kwargs)

    return compressing


TORCH = Activation("horovod.torch")
TENSORFLOW = Activation("horovod.tensorflow", "horovod.tensorflow.keras", "horovod.keras")
