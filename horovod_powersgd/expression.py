"""Compressors as text: on a command line."""

import ast
import inspect
from typing import Any

import horovod_powersgd
from horovod_powersgd.compressors.compressor import Compressor

_exported = {name: vars(horovod_powersgd)[name] for name in horovod_powersgd.__all__}
# By name: all but the one whose argument is a function.
COMPRESSORS = {
    name: value
    for name, value in _exported.items()
    if inspect.isclass(value) and issubclass(value, Compressor) and name not in ("Compressor", "Custom")
}


def compressor_from(expression: str) -> Compressor:
    """The compressor that an expression makes: of compressors' names, called with literals or other compressors.

    Args:
        expression: such as "PowerSGD(rank=8)" or "Accordion(TopK(0.1), TopK(0.01), interval=100)".

    Raises:
        ValueError: it is something else, or a compressor refuses its arguments. It says what.
    """
    try:
        return _compressor(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} makes no compressor: {error}") from error


def _compressor(node: ast.expr) -> Compressor:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMPRESSORS):
        names = ", ".join(COMPRESSORS)
        raise ValueError(f"{ast.unparse(node)} is none with its arguments, as PowerSGD(rank=8) is. There are {names}")
    keywords: dict[Any, Any] = {keyword.arg: _argument(keyword.value) for keyword in node.keywords}
    return COMPRESSORS[node.func.id](*map(_argument, node.args), **keywords)


def _argument(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _compressor(node)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is no literal") from None
