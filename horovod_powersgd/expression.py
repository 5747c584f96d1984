"""Compressors as text: on a command line."""

import ast
import inspect
from typing import Any

import horovod_powersgd
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.precision import HOROVODS_FP16, HOROVODS_NONE

_exported = {name: vars(horovod_powersgd)[name] for name in horovod_powersgd.__all__}
# By name: all but the one whose argument is a function.
COMPRESSORS = {
    name: value
    for name, value in _exported.items()
    if inspect.isclass(value) and issubclass(value, Compressor) and name not in ("Compressor", "Custom")
}
HOROVODS = {"Compression.none": HOROVODS_NONE, "Compression.fp16": HOROVODS_FP16}


def compressor_from(expression: str) -> Compressor:
    """The compressor that an expression makes: of compressors' names, called with literals or other compressors; as in
    a script, with hvd. before them, too, and with Horovod's Compression.none and Compression.fp16 among them.

    Args:
        expression: such as "PowerSGD(rank=8)" or "Auto(hvd.Compression.fp16, hvd.PowerSGD(rank=8))".

    Raises:
        ValueError: it is something else, or a compressor refuses its arguments. It says what.
    """
    try:
        return _compressor(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} makes no compressor: {error}") from error


def _compressor(node: ast.expr) -> Compressor:
    if not (isinstance(node, ast.Call) and _name(node.func) in COMPRESSORS):
        names = ", ".join(COMPRESSORS)
        raise ValueError(f"{ast.unparse(node)} is none with its arguments, as PowerSGD(rank=8) is. There are {names}")
    keywords: dict[Any, Any] = {keyword.arg: _argument(keyword.value) for keyword in node.keywords}
    return COMPRESSORS[_name(node.func)](*map(_argument, node.args), **keywords)


def _name(node: ast.expr) -> str:
    return ast.unparse(node).removeprefix("hvd.") if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _argument(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _compressor(node)
    try:
        return HOROVODS.get(_name(node)) or ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is no literal") from None
