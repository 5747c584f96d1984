"""An exchange in two levels, in PyTorch."""

import contextlib
import os
import subprocess
import time
from unittest import mock

import numpy as np
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError

import cases
import horovod_powersgd.torch as hvd
from horovod_powersgd import PowerSGD, neighbours
from horovod_powersgd.layout import leading_rows
from horovod_powersgd.torch import generation
from horovod_powersgd.torch.calibration import Calibration
from horovod_powersgd.torch.peers import Peers
from trainee import DEVICE, Trainee
from two_levels import CONFIG, CONFIGS, IN_8_BITS, TwoLevels


def next_generation():
    generation._current = [*generation._current]


two_levels = TwoLevels(hvd, Trainee, cases.SHAPES, leading_rows, next_generation)


def check_two_levels_equal_the_reference():
    # Under Gloo in the one precision, under MPI in the other.
    two_levels.equal_the_reference([(c, cases.DTYPES[(i + hvd.mpi_enabled()) % 2]) for i, c in enumerate(CONFIGS)])


def check_the_workers_of_a_host_read_each_other_s_gradients():
    with two_levels.on_hosts():
        trainee = Trainee(CONFIG, "float32")
        trainee.exchange(two_levels.mine(0, "float32"))
    peers = trainee.optimizer._engine._peers
    assert (peers is None) == (two_levels.flat_because() is not None or DEVICE != "cpu")
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with pytest.raises(HorovodInternalError, match="cannot be read any more"):
        Peers(torch.zeros(1), [(os.getpid(), 0), (gone.pid, 8)], 0, ["gradient"]).shown()


def check_parameters_that_come_later_are_exchanged_too():
    mean = (hvd.size() + 1) / 2
    for readable in (True, False):
        parameters = [torch.nn.Parameter(torch.zeros(24, 32, device=DEVICE)) for _ in range(2)]
        sgd, config = torch.optim.SGD(parameters[:1], lr=1.0), PowerSGD(24, 0, hierarchical=True)
        optimizer = hvd.DistributedOptimizer(sgd, [("0", parameters[0])], compression=config)
        unreadable = mock.patch.object(neighbours, "is_readable", lambda offered: False)
        with two_levels.on_hosts(), contextlib.nullcontext() if readable else unreadable:
            for step in range(3):
                if step == 1:
                    optimizer.add_param_group({"params": parameters[1:]})
                optimizer.zero_grad()
                sum((hvd.rank() + 1) * parameter.sum() for parameter in parameters).backward()
                optimizer.step()
        for parameter, steps in zip(parameters, (3, 2)):
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -steps * mean), rtol=1e-4, atol=0)


def check_steps_of_one_level_leave_no_room_to_those_of_two():
    trainee = Trainee(CONFIG, "float32")
    with mock.patch.dict(os.environ, HOROVOD_HOSTNAME=f"other{hvd.rank()}"):
        for step in range(3):  # which could be discarded, so that a memory's room is set aside
            trainee.exchange(two_levels.mine(step, "float32"))
    next_generation()
    with two_levels.on_hosts():
        for step in range(3, 6):
            updates = trainee.exchange(two_levels.mine(step, "float32"))
    for theirs in hvd.allgather_object(updates, name="updates"):
        cases.assert_close(theirs, updates, 0, "bits")
    memory = trainee.state().memory["linear"]
    assert memory.shape == two_levels.own_rows(np.zeros((48, 64))).shape


def check_where_one_cannot_read_gradients_travel_by_messages():
    with mock.patch.object(neighbours, "is_readable", lambda offered: hvd.rank() != 1):
        two_levels.equal_the_reference([(CONFIG, "float32")])


def check_two_levels_in_8_bits_equal_the_reference():
    two_levels.equal_the_reference_in_8_bits(IN_8_BITS)


def check_messages_of_two_levels_are_measured():
    two_levels.messages_are_measured(Calibration(hvd.global_process_set, [(64, 64)]))


def check_a_host_has_one_memory():
    trainee, hosts = two_levels.trained
    with two_levels.on_hosts():
        two_levels.compare(trainee, hosts, CONFIG, "float64", 1)
    memory = trainee.state().memory["linear"]
    assert memory.shape == two_levels.own_rows(np.zeros((48, 64))).shape
    assert trainee.saved()["tensors"]["linear"]["memory"].numel() == memory.size


def check_a_state_goes_on_as_it_was():
    for config in (*CONFIGS[:2], IN_8_BITS[1]):
        two_levels.a_state_goes_on_as_it_was(config, [(Trainee.saved, Trainee.load)])


def check_a_state_of_one_level_goes_on_in_two_and_back():
    for alone in (False, True):
        two_levels.a_state_of_one_level_goes_on_in_two_and_back(alone)


def check_what_memories_hold_stays_when_hosts_change():
    two_levels.what_memories_hold_stays_when_hosts_change(Trainee.exchange)


def check_a_step_that_is_not_taken_or_not_finite_leaves_no_trace():
    def start_and_discard(trainee, gradients):
        trainee.start(gradients)
        trainee.optimizer.synchronize()
        trainee.optimizer.zero_grad()

    two_levels.steps_that_are_not_finite_or_not_taken_leave_no_trace(start_and_discard)


def check_a_worker_that_joins_is_refused():
    if two_levels.flat_because():
        return  # in one level, it is not: torch_feature_checks
    parameter = torch.nn.Parameter(torch.ones(16, 16))
    with two_levels.on_hosts():
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=0.1), [("parameter", parameter)], compression=CONFIG
        )
        (parameter * torch.randn(16, 16)).sum().backward()
        optimizer.step()
        if hvd.rank() > 0:
            optimizer.zero_grad()
            # The last worker first: Horovod's coordinator must have room for what that one sends.
            time.sleep(0.1 * (hvd.size() - 1 - hvd.rank()))
            (parameter * torch.randn(16, 16)).sum().backward()
            with pytest.raises(RuntimeError, match="hvd.join.*hierarchical"):
                optimizer.step()
    hvd.join()
