"""Elastic jobs of TensorFlow and Keras: workers die and join."""

import pytest

from job import ElasticJob, begin_elastic

JOBS = [
    ElasticJob("tensorflow_elastic_training.py", kind, (("TF_USE_LEGACY_KERAS", legacy),))
    for kind, legacy in (("tape", "1"), ("fit", "0"))
]


@pytest.mark.parametrize("elastic_job", JOBS, ids=lambda job: job.kind)
def test_survivors_go_on_and_newcomers_become_equal_replicas(elastic_job):
    workers, output = begin_elastic(elastic_job).result()
    kind = elastic_job.kind
    by_end = {}
    for worker in workers:
        by_end.setdefault(worker[-1]["event"], []).append(worker)
    assert {end: len(found) for end, found in by_end.items()} == {"dies": 1, "end": 3}, output
    # Keras trains the batch again after which an epoch was interrupted: when a worker was lost, and when one came.
    steps = {"tape": 24, "fit": 26}[kind]
    assert all(worker[-1]["step"] == steps and worker[-1]["size"] == 3 for worker in by_end["end"]), output
    assert len({worker[-1]["variables"] for worker in by_end["end"]}) == 1
    decisions = by_end["end"][0][-1]["decisions"]
    assert all(worker[-1]["decisions"] == decisions for worker in by_end["end"]) and bool(decisions) == (kind == "fit")
    # The newcomer has taken the number of steps with the factors.
    assert {worker[-1]["exchanged"] for worker in by_end["end"]} == {steps}, output
    newcomers = 0
    for worker in by_end["end"]:
        starts = [event for event in worker if event["event"] == "start"]
        if len(starts) == 1:
            newcomers += 1
            assert starts[0]["step"] == 12 and starts[0]["memory"] == [], output
            continue
        # Three workers, two, three again; each time from where they were.
        assert [(start["size"], start["step"]) for start in starts] == [(3, 0), (2, 8), (3, 12)], output
        for before, start in zip(worker, worker[1:]):
            if start["event"] == "start":
                assert start["variables"] == before["variables"], output
                assert start["memory"] == before["memory"] and all(norm > 0 for norm in start["memory"]), output
    assert newcomers == 1
