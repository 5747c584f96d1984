"""What keeps an environment from working, and the command that mends it."""

from dataclasses import dataclass

INSTALL_COMMAND = "python -m horovod_powersgd install-horovod"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command that mends it."""

    what: str
    command: str = INSTALL_COMMAND

    def __str__(self) -> str:
        return f"{self.what}. Run: {self.command}"


def import_problem(title: str, error: Exception | str, requirement: str) -> Problem:
    """Of a package that cannot itself be imported; `requirement` is what pip is told to get it."""
    what = f"{title} itself cannot be imported, with or without Horovod ({reason(error)}); pip brings what it needs"
    return Problem(what, f"pip install --force-reinstall {requirement}")


def reason(error: Exception | str) -> str:
    """What an error says, in a line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0].strip() if text.strip() else "no reason is given"
