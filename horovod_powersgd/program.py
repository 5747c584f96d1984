"""A program that is run in this process as Python itself would run it, from its command line."""

import io
import os
import runpy
import sys
import types


def run_program(command: list[str], as_module: bool) -> None:
    """Runs a program as __main__, with its own sys.argv and sys.path. What it raises, SystemExit among it, comes out of
    here; where nobody catches that, the traceback begins in the program.

    Args:
        command: a script's file or a module's name, and its arguments.
        as_module: whether it is a module.
    """
    program = command[0]
    _begin_tracebacks_in_the_program()
    sys.argv = command
    if not getattr(sys.flags, "safe_path", False):  # python -P; Python 3.10 has none
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(program))
    if as_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    # Not by runpy, which takes __main__ away again while threads and exit handlers still run.
    path = os.path.abspath(program)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    main = types.ModuleType("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _begin_tracebacks_in_the_program() -> None:
    shown = sys.excepthook

    def excepthook(kind, error, traceback):
        frames = traceback
        while frames is not None and frames.tb_frame.f_code is not run_program.__code__:
            frames = frames.tb_next
        traceback = frames.tb_next if frames is not None else traceback
        shown(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook
