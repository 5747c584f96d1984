"""The tensors of a model, from what holds it: a function that makes it, a checkpoint, or a list of shapes."""

import importlib
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from horovod_powersgd.layout import leading_rows, trailing_columns

# What is in a checkpoint beside the model: means of its weights and earlier ones, by their names, and states of
# optimizers and of this package's compressors, by what they hold.
OTHERS = re.compile(r"(^|[_.])(ema|swa|best)([_.]|$)")
KEPT = {"state", "param_groups"}, {"config", "tensors", "workers"}


class Unreadable(Exception):
    """What was given holds no model; says what it is and what is wanted."""


class Tensors(NamedTuple):
    """The tensors of a model that have gradients.

    Attributes:
        shapes: by their names.
        matrix_shape: how one is seen as a matrix, as layout_of's.
    """

    shapes: Mapping[str, tuple[int, ...]]
    matrix_shape: Callable = leading_rows


def of_function(name: str) -> Tensors:
    """Of the model that a function makes, PyTorch's or Keras'.

    Args:
        name: "package.module:function"; it is called without arguments.

    Raises:
        Unreadable: there is no such function, or it makes no model.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise Unreadable(f"--model {name}: say package.module:function, a function that makes the model")
    try:
        make = importlib.import_module(module)
        for part in function.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise Unreadable(f"--model {name}: {error} (it is looked for in this folder and in PYTHONPATH)") from error
    if not callable(make):
        raise Unreadable(f"--model {name}: it is no function that makes a model, but {make!r}")
    model = make()
    if hasattr(model, "named_parameters"):
        try:
            return Tensors({name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad})
        except RuntimeError as error:  # a lazy one has none
            unknown = f"--model {name}: a parameter has no shape yet: the function has to call the model once"
            raise Unreadable(unknown) from error
    if hasattr(model, "trainable_variables"):
        variables = model.trainable_variables
        if not variables:
            raise Unreadable(f"--model {name}: the model has no variables yet: the function has to build it")
        found: dict[str, tuple[int, ...]] = {}
        for number, variable in enumerate(variables):
            path = _path(variable, number)  # which several may have, in a model of models
            found[f"{path} ({number})" if path in found else path] = tuple(variable.shape)
        return Tensors(found, trailing_columns)
    raise Unreadable(f"--model {name}: it makes a {type(model).__name__}, which is no model of PyTorch's or Keras'")


def _path(variable: Any, number: int) -> str:
    return getattr(variable, "path", None) or getattr(variable, "name", None) or str(number)


def of_file(path: str | Path) -> Tensors:
    """Of a checkpoint (.pt, .pth, .bin: weights only; .safetensors; .keras), or of a .json file: {name: shape}, a list
    of shapes, or the index (weight_map) of a checkpoint in parts. Of a checkpoint all tensors of floats count, whether
    they have gradients or not; tied weights count once.

    Raises:
        Unreadable: the file is missing, or is none of these.
    """
    path = Path(path)
    readers = {
        ".pt": _of_pytorch, ".pth": _of_pytorch, ".bin": _of_pytorch, ".safetensors": _of_safetensors,
        ".keras": _of_keras, ".json": _of_json,
    }  # fmt: skip
    if path.suffix not in readers:
        raise Unreadable(f"{path}: its name ends in none of {', '.join(readers)}")
    if not path.is_file():
        raise Unreadable(f"{path}: there is no such file")
    try:
        return readers[path.suffix](path)
    except Unreadable:
        raise
    except Exception as error:  # whatever a library says of a file that is another one than its name says
        raise Unreadable(f"{path}: it cannot be read as {path.suffix}: {error}") from error


def _of_json(path: Path) -> Tensors:
    found = json.loads(path.read_text())
    if isinstance(found, dict) and isinstance(found.get("weight_map"), dict):  # the index of a checkpoint in parts
        parts = [of_file(path.parent / name).shapes for name in dict.fromkeys(found["weight_map"].values())]
        return Tensors({name: shape for part in parts for name, shape in part.items()})
    named = found.items() if isinstance(found, dict) else ((str(i), shape) for i, shape in enumerate(found))
    shapes = {}
    for name, shape in named:
        if not (isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)):
            raise Unreadable(f"{path}: the shape of {name} must be a list of integers, not {shape}")
        shapes[name] = tuple(shape)
    return Tensors(shapes)


def _of_safetensors(path: Path) -> Tensors:
    # 8 bytes, the header's length, and the header in JSON.
    with path.open("rb") as file:
        [length] = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise Unreadable(f"{path}: it is no .safetensors file")
        header = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return Tensors({name: tuple(e["shape"]) for name, e in tensors.items() if "F" in e["dtype"]})


def _of_pytorch(path: Path) -> Tensors:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise Unreadable(f"{path}: PyTorch is needed to read it, and is not installed") from None
    # Mapped into memory, and not read: of the numbers only their places count, which tied weights have in common.
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise Unreadable(
            f"{path}: it holds more than tensors, numbers and names: save model.state_dict() alone, or say --model"
        ) from error
    tensors: dict[Any, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in _leaves(found):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            place = tensor.data_ptr() if tensor.layout == torch.strided else 0
            tensors.setdefault((place or name, tensor.shape), (name, tuple(tensor.shape)))
    if not tensors:
        raise Unreadable(f"{path}: there are no tensors in it")
    return Tensors(dict(tensors.values()))


def _leaves(found: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """What is in a checkpoint, without copies of a model, and what optimizers and compressors keep."""
    if isinstance(found, (list, tuple)):
        found = dict(enumerate(found))
    if not isinstance(found, Mapping):
        return [(prefix, found)]
    leaves = []
    for name, value in found.items():
        is_other = isinstance(value, Mapping) and (OTHERS.search(str(name)) or any(k <= value.keys() for k in KEPT))
        if not is_other and "optim" not in str(name):
            leaves += _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _of_keras(path: Path) -> Tensors:
    h5py = importlib.import_module("h5py")  # Keras needs it, too
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file, h5py.File(file) as weights:
        shapes: dict[str, tuple[int, ...]] = {}

        def take(name: str, entry: Any) -> None:
            # A layer's variables are datasets with numbers for names; optimizers' are beside the layers'.
            if isinstance(entry, h5py.Dataset) and not name.startswith("optimizer"):
                shapes[name] = tuple(entry.shape)

        weights.visititems(take)
    return Tensors(shapes, trailing_columns)


def numbers(tensors: Tensors) -> int:
    """How many parameters there are."""
    return sum(map(math.prod, tensors.shapes.values()))
