"""Elastic jobs: workers die and join."""

import pytest

from job import ElasticJob, begin_elastic

JOBS = [ElasticJob("elastic_training.py", kind) for kind in ("SGD", "AdamW")]


@pytest.mark.parametrize("elastic_job", JOBS, ids=lambda job: job.kind)
def test_survivors_keep_their_memory_and_newcomers_become_equal_replicas(elastic_job):
    workers, output = begin_elastic(elastic_job).result()
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
    assert decisions[0] == decisions[1] == decisions[2] and any(decisions[0]) == (elastic_job.kind == "AdamW"), output
