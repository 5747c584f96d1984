"""An exchange in two levels, by workers that are told that they share hosts."""

import copy
import os
import time
from unittest import mock

import numpy as np
import pytest
import torch

import cases
import horovod_powersgd.torch as hvd
from horovod_powersgd import Accordion, PowerSGD, reference
from horovod_powersgd.torch import generation
from trainee import Trainee

# How many workers share each host: as many on all, or not.
HOSTS = {2: (1, 1), 3: (2, 1), 4: (2, 2), 6: (3, 3)}
REASONS = {2: "no two workers share a host", 3: "the hosts have different numbers of workers: 2, 1"}
CONFIGS = [
    PowerSGD(rank=2, min_compression_rate=1, hierarchical=True),
    PowerSGD(rank=3, num_iters_per_step=1, hierarchical=True),
    PowerSGD(rank=2, num_iters_per_step=3, warmup_steps=2, refresh_every=3, hierarchical=True),
    PowerSGD(rank=2, wire_dtype="float16", hierarchical=True),
    PowerSGD(rank=2, error_feedback=False, hierarchical=True),
    Accordion(PowerSGD(rank=3, hierarchical=True), PowerSGD(rank=1, hierarchical=True), interval=2),
]
CONFIG = CONFIGS[0]


def on_hosts():
    """Lets the workers find themselves on hosts, as Horovod's launcher would tell them."""
    host = np.repeat(range(len(HOSTS[hvd.size()])), HOSTS[hvd.size()])[hvd.rank()]
    return mock.patch.dict(os.environ, HOROVOD_HOSTNAME=f"host{host}")


def per_host():
    """How many workers share a host in the exchange: one each where it has one level."""
    return 1 if hvd.size() in REASONS else HOSTS[hvd.size()][0]


def own_rows(array):
    """Of a host's memory, those that this worker has."""
    n, place = len(array), hvd.rank() % per_host()
    return array[n * place // per_host() : n * (place + 1) // per_host()]


def equals_the_reference(trainee, states, config, dtype, steps):
    """Goes on for these steps, with the reference beside it; `states` are the hosts'."""
    for step in steps:
        everyone = [cases.gradients(step, worker, dtype) for worker in range(hvd.size())]
        rate = cases.learning_rate(step)
        expected = reference.simulate(everyone, states, config, learning_rate=rate, workers_per_host=per_host())[0]
        trainee.set_rate(rate)
        updates = trainee.exchange(everyone[hvd.rank()])
        largest = cases.tolerance(config, dtype, hvd.size(), step + 1)
        cases.assert_close(updates, expected, largest, (config, dtype, step))
        memory = states[hvd.rank() // per_host()].memory
        rows = {name: own_rows(array) for name, array in memory.items()}
        cases.assert_close(trainee.state().memory, rows, largest, (config, dtype, step, "memory"), memory)


def hosts():
    return [reference.State() for _ in range(hvd.size() // per_host())]


def hosts_of(shared, memories):
    """The hosts' states: what is shared of a state, and the means of their workers' memories."""
    found = hosts()
    for host, state in enumerate(found):
        sharing = memories[host * per_host() : (host + 1) * per_host()]
        state.steps, state.factors = shared.steps, dict(shared.factors)
        state.memory = {name: np.mean([memory[name] for memory in sharing], axis=0) for name in sharing[0]}
    return found


def next_generation():
    """As hvd.init() begins one in an elastic job."""
    generation._current = [*generation._current]


def check_two_levels_equal_the_reference():
    # Under Gloo in the one precision, under MPI in the other.
    for i, config in enumerate(CONFIGS):
        dtype = cases.DTYPES[(i + hvd.mpi_enabled()) % 2]
        with on_hosts():
            trainee = Trainee(config, dtype)
            equals_the_reference(trainee, hosts(), config, dtype, range(9))
            assert trainee.stats().flat_because == REASONS.get(hvd.size())


def check_a_factor_in_8_bits_travels_in_one_level():
    with on_hosts():
        trainee = Trainee(PowerSGD(rank=2, wire_dtype="int8", hierarchical=True))
        trainee.exchange(cases.gradients(0, hvd.rank(), "float32"))
    assert "8 bits" in trainee.stats().flat_because


def check_a_host_has_one_memory():
    with on_hosts():
        trainee = Trainee(CONFIG)
        trainee.exchange(cases.gradients(0, hvd.rank(), "float32"))
    memory = trainee.state().memory["linear"]
    assert memory.shape == own_rows(np.zeros((48, 64))).shape
    state = trainee.optimizer.compression_state_dict()["tensors"]["linear"]
    assert state["memory"].numel() == memory.size


def check_a_state_goes_on_as_it_was():
    for config in (CONFIG, CONFIGS[1]):
        with on_hosts():
            whole = Trainee(config)
            for step in range(4):
                whole.exchange(cases.gradients(step, hvd.rank(), "float32"))
            resumed = Trainee(config)
            resumed.optimizer.load_compression_state_dict(copy.deepcopy(whole.optimizer.compression_state_dict()))
            for step in range(4, 7):
                mine = cases.gradients(step, hvd.rank(), "float32")
                expected = whole.exchange(mine)
                largest = cases.largest_error_of_a_repetition(hvd.size())
                cases.assert_close(resumed.exchange(mine), expected, largest, (config, step))


def check_a_state_of_one_level_goes_on_in_two_and_back():
    flat = PowerSGD(rank=2, min_compression_rate=1)
    for alone in (False, True):
        before = Trainee(flat, "float64")
        states = [reference.State() for _ in range(hvd.size())]
        for step in range(3):
            everyone = [cases.gradients(step, worker, "float64") for worker in range(hvd.size())]
            reference.simulate(everyone, states, flat)
            before.exchange(everyone[hvd.rank()])

        def saved(trainee, alone=alone):
            state = trainee.optimizer.compression_state_dict()
            return state if alone else hvd.allgather_object(state)

        with on_hosts():
            between = Trainee(CONFIG, "float64")
            between.optimizer.load_compression_state_dict(saved(before))
            divided = hosts_of(states[0], [state.memory for state in states])
            equals_the_reference(between, divided, CONFIG, "float64", range(3, 6))
        after = Trainee(flat, "float64")
        after.optimizer.load_compression_state_dict(saved(between))
        everyone = [cases.gradients(6, worker, "float64") for worker in range(hvd.size())]
        # Whatever the division: the mean of delta is what counts in the first half-step.
        expected = reference.simulate(everyone, divided, flat, workers_per_host=per_host())[0]
        cases.assert_close(after.exchange(everyone[hvd.rank()]), expected, 1e-9, "back")


def check_what_memories_hold_stays_when_hosts_change():
    with on_hosts():
        trainee, states = Trainee(CONFIG, "float64"), hosts()
        equals_the_reference(trainee, states, CONFIG, "float64", range(3))
    next_generation()
    # None of them shares a host with another one now.
    with mock.patch.dict(os.environ, HOROVOD_HOSTNAME=f"other{hvd.rank()}"):
        everyone = [cases.gradients(3, worker, "float64") for worker in range(hvd.size())]
        updates = trainee.exchange(everyone[hvd.rank()])
        means = [reference.State(s.steps, dict(s.memory), dict(s.factors)) for s in states]
        # In the first half-step the mean of the memories is what counts, whoever has which.
        expected = reference.simulate(everyone, means, CONFIG, workers_per_host=per_host())[0]
        cases.assert_close(updates, expected, 1e-9, "one level")
        memories = hvd.allgather_object(trainee.state().memory)
        for name in expected:
            if name in memories[0]:
                found = np.mean([memory[name] for memory in memories], axis=0)
                assert cases.error(found, np.mean([s.memory[name] for s in means], axis=0)) < 1e-9, name
    next_generation()
    with on_hosts():
        divided = hosts_of(means[0], memories)
        equals_the_reference(trainee, divided, CONFIG, "float64", range(4, 6))


def check_a_step_that_is_not_taken_or_not_finite_leaves_no_trace():
    with on_hosts():
        trainee, usual = Trainee(CONFIG, "float64"), Trainee(CONFIG, "float64")
        for step in range(4):
            mine = cases.gradients(step, hvd.rank(), "float64")
            trainee.start(cases.gradients(step + 9, hvd.rank(), "float64"))
            trainee.optimizer.synchronize()
            trainee.optimizer.zero_grad()
            spoiled = {name: np.where(hvd.rank() == 1, np.nan, array) for name, array in mine.items()}
            assert np.isnan(trainee.exchange(spoiled)["linear"]).any()
            cases.assert_close(trainee.exchange(mine), usual.exchange(mine), 1e-12, step)
        assert trainee.stats().steps == 4


def check_a_worker_that_joins_is_refused():
    if hvd.size() in REASONS:
        return  # in one level, it is not: torch_feature_checks
    parameter = torch.nn.Parameter(torch.ones(16, 16))
    with on_hosts():
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=0.1),
            [("parameter", parameter)],
            compression=PowerSGD(rank=2, hierarchical=True),
        )
        (parameter * torch.randn(16, 16)).sum().backward()
        optimizer.step()
        if hvd.rank() > 0:
            optimizer.zero_grad()
            # The last worker first: Horovod's coordinator must have room for what that one sends.
            time.sleep(0.1 * (hvd.size() - 1 - hvd.rank()))
            (parameter * torch.randn(16, 16)).sum().backward()
            with pytest.raises(RuntimeError, match="join"):
                optimizer.step()
    hvd.join()
