"""Elastic jobs: hosts go and come."""

import pytest

from job import ElasticJob, begin_elastic

JOBS = [ElasticJob("elastic_training.py", kind) for kind in ("SGD", "AdamW", "Auto")]
JOBS.append(ElasticJob("elastic_training.py", "hierarchical", hosts=2, per_host=2))


@pytest.mark.parametrize("elastic_job", JOBS, ids=lambda job: job.kind)
def test_survivors_keep_their_memory_and_newcomers_become_equal_replicas(elastic_job):
    workers, output = begin_elastic(elastic_job).result()
    by_end = {worker[-1]["event"]: [] for worker in workers}
    for worker in workers:
        by_end[worker[-1]["event"]].append(worker)
    of_host, size = elastic_job.per_host, elastic_job.hosts * elastic_job.per_host
    assert {end: len(found) for end, found in by_end.items()} == {"dies": of_host, "end": size}, output
    newcomers = []
    for worker in by_end["end"]:
        assert worker[-1]["size"] == size
        starts = [event for event in worker if event["event"] == "start"]
        for step in (event for event in worker if event["event"] == "step"):
            # In two levels as long as there are two hosts.
            one_host = elastic_job.kind == "hierarchical" and step["size"] < size
            assert (step["flat_because"] is not None) == one_host, output
        if len(starts) == 1:
            newcomers.append(worker)
            assert starts[0]["step"] >= 12 and all(norm == 0 for norm in starts[0]["memory"]), output
            continue
        # All workers, one host fewer, all again; each time with the memory of the step before.
        assert [start["size"] for start in starts] == [size, size - of_host, size], output
        for before, start in zip(worker, worker[1:]):
            if start["event"] == "start":
                assert start["memory"] == before["memory"], output
                # With Auto it depends on what was tried.
                assert elastic_job.kind == "Auto" or all(norm > 0 for norm in start["memory"]), output
    assert [newcomer[-1]["exchanged"] for newcomer in newcomers] == [24] * of_host, output
    # With AdamW it is Accordion that compresses.
    decisions = [worker[-1]["decisions"] for worker in by_end["end"]]
    assert all(own == decisions[0] and any(own) == (elastic_job.kind == "AdamW") for own in decisions), output
    # Auto has measured among the workers that are there now, and found the same everywhere.
    predicted = [worker[-1]["predicted"] for worker in by_end["end"]]
    assert all(own == predicted[0] and any(own) == (elastic_job.kind == "Auto") for own in predicted), output
