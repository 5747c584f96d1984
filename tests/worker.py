"""One worker of a job: runs checks in order, and writes each outcome as a line of JSON.

    worker.py FOLDER SECONDS MODULE.CHECK...

A check that takes longer than so many seconds ends the worker, which first tells where it is.
"""

import faulthandler
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import psutil


def main(folder, seconds, *checks):
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    # All are imported before the first check: what one of them needs may have to come before Horovod starts. Nothing of
    # it is garbage; to look for that takes a quarter of the time.
    gc.disable()
    modules = {module: importlib.import_module(module) for module in dict.fromkeys(c.partition(".")[0] for c in checks)}
    gc.freeze()
    gc.enable()
    hvd = next(iter(modules.values())).hvd
    hvd.init()
    since_start = time.time() - psutil.Process().create_time()
    with open(Path(folder) / f"{hvd.rank()}.jsonl", "w") as report:
        write(report, None, None, since_start, time.process_time())
        for check in checks:
            faulthandler.dump_traceback_later(float(seconds), exit=True)
            print(check, flush=True)
            module, _, name = check.partition(".")
            began, cpu_began, failure = time.monotonic(), time.process_time(), None
            try:
                getattr(modules[module], name)()
            except Exception:
                failure = traceback.format_exc()
                print(failure, flush=True)
            write(report, check, failure, time.monotonic() - began, time.process_time() - cpu_began)
            # A worker that failed early must not meet the others in the next check's exchanges.
            hvd.allgather_object(check)


def write(file, check, failure, seconds, cpu_seconds):
    report = {"failure": failure, "seconds": seconds, "cpu_seconds": cpu_seconds}
    file.write(json.dumps({"check": check, "report": report}) + "\n")
    file.flush()


main(*sys.argv[1:])
