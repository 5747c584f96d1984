"""The command plan in the workers of a job, whatever the framework."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

from horovod_powersgd import calibration, plan, planning
from horovod_powersgd.__main__ import _parser
from horovod_powersgd.environment import frameworks
from horovod_powersgd.plan import HALVES, PLAIN, SETTINGS

INT8, RANK_8 = "hvd.Int8()", "hvd.PowerSGD(rank=8)"
FEW = {setting: SETTINGS[setting] for setting in (PLAIN, HALVES, INT8, RANK_8)}


def plan_is_measured(hvd, framework):
    """As if no other framework were installed, with fewer settings, and less time for each.

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
        mock.patch.object(calibration, "SECONDS_BEFORE", 0.03),
        contextlib.redirect_stdout(printed),
    ):
        file = Path(folder) / "shapes.json"
        file.write_text('{"weight": [1000, 500], "bias": [500]}')
        of_nine = ["--link", "1gbit", "--workers", "9"]  # whose codes are averaged in two rounds
        for network in ([], of_nine):
            assert planning.main(_parser().parse_args(["plan", "--shapes", str(file), "--json", *network])) == 0
            if hvd.rank() > 0:
                assert printed.getvalue() == ""
                continue
            found = json.loads(printed.getvalue())
            printed.truncate(printed.seek(0))
            assert found["workers"] == (9 if network else hvd.size()) and found["recommended"] in FEW
            options = {option["setting"]: option for option in found["options"]}
            assert list(options) == list(FEW) and all(option["network"] > 0 for option in options.values())
            assert all((option["processor"] > 0) == (setting != PLAIN) for setting, option in options.items())
            assert all(0 <= option["overlap"] <= 1 for option in options.values())
