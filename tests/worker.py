"""One worker of a job: runs a module's checks in order, and writes each outcome as a line of JSON.

    worker.py MODULE FOLDER SECONDS CHECK...
"""

import faulthandler
import importlib
import json
import sys
import traceback
from pathlib import Path


def main(module_name, folder, seconds, *checks):
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    module = importlib.import_module(module_name)
    hvd = module.hvd
    hvd.init()
    with open(Path(folder) / f"{hvd.rank()}.jsonl", "w") as report:
        for check in checks:
            print(check, flush=True)
            failure = None
            try:
                getattr(module, check)()
            except Exception:
                failure = traceback.format_exc()
                print(failure, flush=True)
            report.write(json.dumps([check, failure]) + "\n")
            report.flush()
            # A worker that failed early must not meet the others in the next check's exchanges.
            hvd.allgather_object(check)


main(*sys.argv[1:])
