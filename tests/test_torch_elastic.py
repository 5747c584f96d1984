"""Elastic jobs: workers die and join. Several names of this machine stand for its hosts."""

import json
import sys

import pytest

from horovod_powersgd.launcher import find_program
from job import HERE, run

HOSTS = ["localhost:1", "127.0.0.1:1", "127.1:1"]
LATER = "127.0.1:1"


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_survivors_keep_their_memory_and_newcomers_become_equal_replicas(kind, tmp_path):
    discover = tmp_path / "discover.sh"
    hosts = "\n".join(f"echo {host}" for host in HOSTS)
    discover.write_text(f"#!/bin/sh\n{hosts}\n[ -e {tmp_path}/grow ] && echo {LATER}\nexit 0\n")
    discover.chmod(0o755)
    command = [find_program("horovodrun"), "--gloo", "-np", "3", "--min-np", "2", "--max-np", "3"]
    command += ["--host-discovery-script", discover, "--disable-cache", "--elastic-timeout", "120"]
    command += [sys.executable, HERE / "elastic_training.py", tmp_path, kind]
    output = run([str(word) for word in command], 240, {"HOROVOD_GLOO_TIMEOUT_SECONDS": "5"})

    workers = [[json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")]
    by_end = {worker[-1]["event"]: [] for worker in workers}
    for worker in workers:
        by_end[worker[-1]["event"]].append(worker)
    assert {end: len(found) for end, found in by_end.items()} == {"dies": 1, "end": 3}, output
    for worker in by_end["end"]:
        assert worker[-1]["size"] == 3
        starts = [event for event in worker if event["event"] == "start"]
        if len(starts) == 1:
            newcomer = worker
            assert starts[0]["step"] >= 12 and all(norm == 0 for norm in starts[0]["memory"]), output
            continue
        # Three workers, two, three again; each time with the memory of the step before.
        assert [start["size"] for start in starts] == [3, 2, 3], output
        for before, start in zip(worker, worker[1:]):
            if start["event"] == "start":
                assert start["memory"] == before["memory"] and all(norm > 0 for norm in start["memory"]), output
    assert newcomer[-1]["exchanged"] == 24, output
    # With AdamW it is Accordion that compresses.
    decisions = [worker[-1]["decisions"] for worker in by_end["end"]]
    assert decisions[0] == decisions[1] == decisions[2] and any(decisions[0]) == (kind == "AdamW"), output
