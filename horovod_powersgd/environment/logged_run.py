"""Commands whose output goes to a log."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class BuildError(Exception):
    """Horovod cannot be built here. The first line of the message says why and what to do."""


class LoggedRun:
    """Runs commands, with what they print in a log."""

    def __init__(self, log: Path, lock: int | None = None):
        self._log = log
        self._lock = lock
        log.unlink(missing_ok=True)

    def __call__(
        self,
        failure: str,
        command: list[str],
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Run one command; with `report`, say from time to time how far its make is."""
        with open(self._log, "ab") as output:
            output.write(f"+ {' '.join(command)}\n".encode())
            output.flush()
            start = output.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,  # so that its whole family can be ended
                pass_fds=() if self._lock is None else (self._lock,),  # the lock lasts as long as the build does
            )
        try:
            self._wait(process, start, report)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode != 0:
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise BuildError("\n".join([f"{failure} (log: {self._log})", *(f"  | {line}" for line in tail)]))

    def _wait(self, process: subprocess.Popen, start: int, report: Callable[[str], None] | None) -> None:
        began = told = time.monotonic()
        while True:
            try:
                process.wait(timeout=1)
                return
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if report is not None and now - told >= 20:
                told = now
                with open(self._log, "rb") as log:
                    log.seek(start)
                    percentages = re.findall(rb"^\[ *(\d+)%\]", log.read(), re.MULTILINE)
                minutes, seconds = divmod(int(now - began), 60)
                share = int(percentages[-1]) if percentages else 0
                report(f"  {share:3d} %   {minutes}:{seconds:02d}")
