"""The command plan in the workers of a job, whatever the framework."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

from horovod_powersgd import plan, planning
from horovod_powersgd.__main__ import _parser
from horovod_powersgd.environment import frameworks
from horovod_powersgd.plan import HALVES, PLAIN, SETTINGS

RANK_8 = "hvd.PowerSGD(rank=8)"
FEW = {setting: SETTINGS[setting] for setting in (PLAIN, HALVES, RANK_8)}


def plan_is_measured(hvd, framework):
    """As if no other framework were installed, and with fewer settings: each takes its time.

    Args:
        hvd: the framework's.
        framework: its name.
    """
    package_directory, printed = frameworks.package_directory, io.StringIO()

    def directory(name):
        return package_directory(name) if name == framework else None

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(frameworks, "package_directory", directory),
        mock.patch.dict(SETTINGS, FEW, clear=True),
        mock.patch.object(plan, "CAREFUL", list(FEW)),
        contextlib.redirect_stdout(printed),
    ):
        file = Path(folder) / "shapes.json"
        file.write_text('{"weight": [2000, 1000], "bias": [1000]}')
        assert planning.main(_parser().parse_args(["plan", "--shapes", str(file), "--json"])) == 0
    if hvd.rank() > 0:
        assert printed.getvalue() == ""
        return
    found = json.loads(printed.getvalue())
    assert found["workers"] == hvd.size() and found["recommended"] in FEW
    options = {option["setting"]: option for option in found["options"]}
    assert list(options) == list(FEW) and all(option["network"] > 0 for option in options.values())
    assert options[PLAIN]["processor"] == 0
    assert options[HALVES]["processor"] > 0 and options[RANK_8]["processor"] > 0
