"""An exchange in two levels, by workers that are told that they share hosts, beside the reference; the same for every
framework."""

import contextlib
import copy
import functools
import os
from unittest import mock

import numpy as np

import cases
from horovod_powersgd import Accordion, PowerSGD, reference
from horovod_powersgd.quantization import TWO_ROUNDS

# Which workers share each host: neighbours, or not; as many on all, or not.
HOSTS = {2: [[0], [1]], 3: [[0, 1], [2]], 4: [[0, 3], [1, 2]], 6: [[0, 1, 2], [3, 4, 5]]}
REASONS = {2: "no two workers share a host", 3: "the hosts have different numbers of workers: 2, 1"}
CONFIGS = [
    PowerSGD(rank=2, min_compression_rate=1, hierarchical=True),
    PowerSGD(rank=3, num_iters_per_step=1, hierarchical=True, memory_dtype="float16"),
    PowerSGD(3, num_iters_per_step=3, min_compression_rate=0, warmup_steps=2, refresh_every=3, hierarchical=True),
    PowerSGD(rank=2, wire_dtype="float16", hierarchical=True),
    PowerSGD(rank=2, error_feedback=False, hierarchical=True),
    Accordion(*(PowerSGD(rank, hierarchical=True, memory_dtype="bfloat16") for rank in (3, 1)), interval=2),
]
IN_8_BITS = [
    PowerSGD(rank=3, wire_dtype="int8", hierarchical=True),
    PowerSGD(rank=2, wire_dtype="int8", hierarchical=True, num_iters_per_step=1, memory_dtype="bfloat16"),
    Accordion(*(PowerSGD(rank, wire_dtype="int8", hierarchical=True) for rank in (3, 1)), interval=2),
]
CONFIG, FLAT = CONFIGS[0], PowerSGD(rank=2, min_compression_rate=1)


class TwoLevels:
    """Compares trainees in this worker's place among the others. What they do is told in equivalence.py, but that they
    have saved(), this worker's compression state, and load(states).

    Args:
        hvd: the framework's.
        trainee: makes one, of a configuration and a dtype.
        shapes: of its parameters, by name.
        matrix_shape: how the framework's tensors are seen as matrices.
        next_generation: begins one, as hvd.init() does in an elastic job.
    """

    def __init__(self, hvd, trainee, shapes, matrix_shape, next_generation):
        self._hvd, self._trainee, self._shapes = hvd, trainee, shapes
        self._matrix_shape, self._next_generation = matrix_shape, next_generation

    def on_hosts(self):
        """Lets the workers find themselves on hosts, as Horovod's launcher would tell them."""
        (host,) = [number for number, some in enumerate(HOSTS[self._hvd.size()]) if self._hvd.rank() in some]
        return mock.patch.dict(os.environ, HOROVOD_HOSTNAME=f"host{host}")

    def flat_because(self):
        """Why the exchange has one level; None where it has two."""
        return REASONS.get(self._hvd.size())

    @functools.cached_property
    def trained(self):
        """A trainee of CONFIG that goes on from check to check, and the hosts' states."""
        return self._trainee(CONFIG, "float64"), self._hosts()

    def _sharing(self):
        """Which workers share each host in the exchange: none where it has one level."""
        size = self._hvd.size()
        return [[worker] for worker in range(size)] if self.flat_because() else HOSTS[size]

    def _place(self):
        """The number of this worker's host, and its place there."""
        rank = self._hvd.rank()
        return next((number, some.index(rank)) for number, some in enumerate(self._sharing()) if rank in some)

    def own_rows(self, array):
        """Of a host's memory, those that this worker has."""
        n, parts, (_, place) = len(array), len(self._sharing()[0]), self._place()
        return array[n * place // parts : n * (place + 1) // parts]

    def gradients(self, step, dtype="float64"):
        """All workers'."""
        return [cases.gradients(step, worker, dtype, self._shapes) for worker in range(self._hvd.size())]

    def mine(self, step, dtype="float64"):
        """This worker's gradients."""
        return cases.gradients(step, self._hvd.rank(), dtype, self._shapes)

    def simulate(self, everyone, states, config, rate=None):
        """The updates of one step; `states` are the hosts', and changed."""
        per_host = self._hvd.size() // len(states)
        if per_host > 1:
            everyone = [everyone[worker] for some in self._sharing() for worker in some]
        return reference.simulate(everyone, states, config, self._matrix_shape, rate, per_host)[0]

    def compare(self, trainee, states, config, dtype, steps):
        """Goes on for so many steps, with the reference beside it; `states` are the hosts'."""
        for step in range(states[0].steps, states[0].steps + steps):
            everyone, rate = self.gradients(step, dtype), cases.learning_rate(step)
            expected = self.simulate(everyone, states, config, rate)
            trainee.set_rate(rate)
            updates = trainee.exchange(everyone[self._hvd.rank()])
            largest = cases.tolerance(config, dtype, self._hvd.size(), step + 1)
            cases.assert_close(updates, expected, largest, (config, dtype, step))
            memory = states[self._place()[0]].memory
            rows = {name: self.own_rows(array) for name, array in memory.items()}
            cases.assert_close(trainee.state().memory, rows, largest, (config, dtype, step, "memory"), expected)
            if not isinstance(config, Accordion):  # what that sends depends on its decisions
                size, per_host, stats = self._hvd.size(), len(self._sharing()[0]), trainee.stats()
                how = np.dtype(dtype).itemsize, step, self._matrix_shape, per_host
                assert (stats.bytes_sent, stats.bytes_received) == config.traffic(self._shapes.values(), size, *how)

    def _hosts(self):
        return [reference.State() for _ in self._sharing()]

    def _divide(self, hosts, shared, memories):
        """Gives the hosts' states what is shared of a state, and the means of their workers' memories."""
        for some, state in zip(self._sharing(), hosts, strict=True):
            sharing = [memories[worker] for worker in some]
            state.steps, state.factors = shared.steps, dict(shared.factors)
            state.memory = {name: np.mean([memory[name] for memory in sharing], axis=0) for name in sharing[0]}

    def equal_the_reference(self, runs):
        """Each (configuration, dtype) of these, and the workers end with the same bits."""
        for config, dtype in runs:
            with self.on_hosts():
                trainee = self._trainee(config, dtype)
                self.compare(trainee, self._hosts(), config, dtype, 9)
                assert trainee.stats().flat_because == self.flat_because()
                updates = trainee.exchange(self.mine(9, dtype))
            for theirs in self._hvd.allgather_object(updates, name="updates"):
                cases.assert_close(theirs, updates, 0, (config, dtype, "bits"))

    def equal_the_reference_in_8_bits(self, configs):
        """Each of these, whether hosts average in one round of messages or in two. In one level, the first."""
        rounds = [contextlib.nullcontext(), cases.in_two_rounds()]
        if self.flat_because():
            configs, rounds = configs[:1], rounds[:1]
        for some in rounds:
            with some:
                self.equal_the_reference([(config, "float64") for config in configs])
        with self.on_hosts():
            nothing = {name: np.zeros(shape, "float32") for name, shape in self._shapes.items()}
            updates = self._trainee(configs[0], "float32").exchange(nothing)
            cases.assert_close(updates, nothing, 0, "columns of zeros")

    def messages_are_measured(self, calibration):
        """By what is given: the framework's Calibration of all workers, for a model of 2**14 bytes."""
        with self.on_hosts():
            found = calibration.network(levels=True)
        assert found.workers == self._hvd.size()
        of_model = [2**10, 2**14]
        assert all([nbytes for nbytes, _ in curve.points] == of_model for curve in (found.allreduce, found.halves))
        assert [nbytes for nbytes, _ in found.allgather.points] == [nbytes / self._hvd.size() for nbytes in of_model]
        if self._hvd.size() >= TWO_ROUNDS:
            assert [nbytes for nbytes, _ in found.alltoall.points] == of_model
        else:
            assert found.alltoall == found.allgather
        if self.flat_because():
            assert found.hosts is None
        else:
            per_host, *curves = found.hosts
            assert per_host == len(self._sharing()[0])
            assert all([nbytes for nbytes, _ in curve.points] == of_model for curve in curves)
        numbers = [np.ones(count) for count in (2**14, 2**18)]
        taken = calibration.in_turn([functools.partial(np.add, some, some, out=some) for some in numbers])
        assert 0 < taken[0] < taken[1]
        for theirs in self._hvd.allgather_object((found, taken), name="network"):
            assert theirs == (found, taken)

    def a_state_goes_on_as_it_was(self, config, ways):
        """Each way is a function that saves a trainee's state, and one that loads that into another."""
        with self.on_hosts():
            whole, resumed = (self._trainee(config, "float32") for _ in range(2))
            for number, (save, load) in enumerate(ways):
                for step in range(4):
                    whole.exchange(self.mine(step, "float32"))
                    if number:
                        resumed.exchange(self.mine(step + 9, "float32"))
                load(resumed, save(whole))
                for step in range(4, 7):
                    mine = self.mine(step, "float32")
                    expected = whole.exchange(mine)
                    largest = cases.largest_error_of_a_repetition(self._hvd.size())
                    cases.assert_close(resumed.exchange(mine), expected, largest, (config, number, step))

    def a_state_of_one_level_goes_on_in_two_and_back(self, alone):
        """The workers load all states, or each its own alone."""
        (trainee, hosts), rank = self.trained, self._hvd.rank()
        flat, states = self._trainee(FLAT, "float64"), [reference.State() for _ in range(self._hvd.size())]

        def saved(trainee):
            return trainee.saved() if alone else self._hvd.allgather_object(trainee.saved(), name="saved")

        for step in range(3):
            everyone = self.gradients(step)
            self.simulate(everyone, states, FLAT)
            flat.exchange(everyone[rank])
        with self.on_hosts():
            trainee.load(saved(flat))
            self._divide(hosts, states[0], [state.memory for state in states])
            self.compare(trainee, hosts, CONFIG, "float64", 3)
        flat.load(saved(trainee))
        everyone, copied = self.gradients(6), copy.deepcopy(hosts)
        # Whatever the division: the mean of delta is what counts in the first half-step.
        expected = self.simulate(everyone, copied, FLAT)
        cases.assert_close(flat.exchange(everyone[rank]), expected, 1e-9, "back")

    def what_memories_hold_stays_when_hosts_change(self, exchange):
        """`exchange` gives a trainee's updates in the step after the change."""
        trainee, hosts = self.trained
        with self.on_hosts():
            self.compare(trainee, hosts, CONFIG, "float64", 3)
        self._next_generation()
        # None of them shares a host with another one now.
        with mock.patch.dict(os.environ, HOROVOD_HOSTNAME=f"other{self._hvd.rank()}"):
            everyone = self.gradients(3)
            updates = exchange(trainee, everyone[self._hvd.rank()])
            # In the first half-step the mean of the memories is what counts, whoever has which.
            expected = self.simulate(everyone, hosts, CONFIG)
            cases.assert_close(updates, expected, 1e-9, "one level")
            memories = self._hvd.allgather_object(trainee.state().memory, name="memories")
            for name in memories[0]:
                found = np.mean([memory[name] for memory in memories], axis=0)
                assert cases.error(found, np.mean([host.memory[name] for host in hosts], axis=0)) < 1e-9, name
        self._next_generation()
        with self.on_hosts():
            self._divide(hosts, hosts[0], memories)
            self.compare(trainee, hosts, CONFIG, "float64", 2)

    def steps_that_are_not_finite_or_not_taken_leave_no_trace(self, start_and_discard):
        """`start_and_discard` exchanges a trainee's gradients, and does not take the step."""
        config, (trainee, hosts) = CONFIG, self.trained
        if self._hvd.mpi_enabled():  # under Gloo in single precision, under MPI in 8 bits
            config = IN_8_BITS[0]
            trainee, hosts = self._trainee(config, "float64"), self._hosts()
        with self.on_hosts():
            for step in range(3):
                start_and_discard(trainee, self.mine(step + 99))
                spoiled = {
                    name: np.where(self._hvd.rank() == 1, np.nan, array) for name, array in self.mine(step).items()
                }
                assert np.isnan(trainee.exchange(spoiled)["linear"]).any()
                self.compare(trainee, hosts, config, "float64", 1)
            assert trainee.stats().steps == hosts[0].steps
