"""Which workers share a host, and the reference's exchange in two levels."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

import cases
from horovod_powersgd import PowerSGD, reference
from horovod_powersgd.hosts import Host, RowShare, host_key, host_of


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_all_rows_once_and_differ_by_one(n, parts):
    shares = [RowShare(place, parts).rows(n) for place in range(parts)]
    assert [row for first, count in shares for row in range(first, first + count)] == list(range(n))
    counts = [count for _, count in shares]
    assert max(counts) - min(counts) <= 1
    assert [RowShare(0, parts).rows(n, place) for place in range(parts)] == shares


def test_workers_of_a_host_need_not_be_neighbours():
    found = host_of([5, 3, 3, 5], 2)
    assert found == Host(hosts=((0, 3), (1, 2)), number=1, share=RowShare(1, 2))
    assert found.peers == (1, 2)
    assert host_of([5, 3, 3, 5], 0) == Host(hosts=((0, 3), (1, 2)), number=0, share=RowShare(0, 2))


@pytest.mark.parametrize(
    "keys, reason",
    [
        ([1, 1], "one host"),
        ([1, 2, 3], "no two workers"),
        ([1, 1, 2], "different numbers of workers: 2, 1"),
        ([1, 1, 2, 0], "has joined"),
    ],
)
def test_there_is_one_level_for_a_reason(keys, reason):
    assert reason in host_of(keys, 0)


def test_a_host_is_known_by_its_name(monkeypatch):
    monkeypatch.setenv("HOROVOD_HOSTNAME", "a")
    key = host_key()
    assert key > 0 and host_key() == key
    monkeypatch.setenv("HOROVOD_HOSTNAME", "b")
    assert host_key() != key
    monkeypatch.delenv("HOROVOD_HOSTNAME")
    assert host_key() not in (0, key)


@pytest.mark.parametrize("wire_dtype", [None, "int8"])
def test_the_references_two_levels_are_one_worker_a_host_with_the_hosts_mean(wire_dtype):
    everyone = [cases.gradients(0, worker, "float64") for worker in range(6)]
    hosts, alone = ([reference.State() for _ in range(2)] for _ in range(2))
    config = PowerSGD(wire_dtype=wire_dtype, hierarchical=True)
    found = reference.simulate(everyone, hosts, config, workers_per_host=3)
    means = [{n: np.mean([g[n] for g in some], axis=0) for n in some[0]} for some in (everyone[:3], everyone[3:])]
    expected = reference.simulate(means, alone, PowerSGD(wire_dtype=wire_dtype))
    assert len(found) == 6
    for update in found:
        cases.assert_close(update, expected[0], 0, "two levels")
