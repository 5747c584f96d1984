"""Comparisons of real workers with the reference, the same for every framework.

A run is (configuration, dtype). A trainee holds parameters whose gradients are given, and exchanges them: after
start(gradients), finish() gives the updates; state() is this worker's reference.State.
"""

import itertools

import numpy as np
from hypothesis import given, seed, settings, strategies as st

import cases
from horovod_powersgd import PowerSGD, reference

RUNS = list(itertools.product(cases.CONFIGS, cases.DTYPES))


class Equivalence:
    """Compares trainees in this worker's place among the others.

    Args:
        hvd: the framework's.
        trainee: makes one, of a configuration, a dtype and shapes by name.
        matrix_shape: how the framework's tensors are seen as matrices.
        runs: of these workers.
    """

    def __init__(self, hvd, trainee, matrix_shape, runs=lambda: RUNS):
        self._hvd, self._trainee, self._matrix_shape, self._runs = hvd, trainee, matrix_shape, runs
        self._trained = None

    def trainees(self):
        """One for each run. They exchange at the same time, which saves rounds of messages."""
        return {run: self._trainee(*run) for run in self._runs()}

    def exchange_all(self, trainees, step):
        """Yields (run, trainee, its updates) after one step of all."""
        for (_, dtype), trainee in trainees.items():
            trainee.set_rate(cases.learning_rate(step))
            trainee.start(cases.gradients(step, self._hvd.rank(), dtype))
        for run, trainee in trainees.items():
            yield run, trainee, trainee.finish()

    def a_run_of_20_steps(self):
        everyone = self.trainees()
        self._compare(everyone, steps=20)
        self._trained = everyone

    def a_run_of_compressors(self, runs, steps=9):
        """Each (configuration, dtype) of these, its bytes, and Accordion's decisions, too."""
        everyone = {run: self._trainee(*run) for run in runs}
        self._compare(everyone, steps, what_happened=self._compare_stats)

    def _compare(self, everyone, steps, what_happened=lambda *_: None):
        hvd, runs = self._hvd, list(everyone)
        assert runs, "nothing to compare falls to these workers"
        # Each worker simulates its share.
        mine = runs[hvd.rank() :: hvd.size()]
        simulated = {run: cases.simulated(*run, hvd.size(), steps, self._matrix_shape) for run in mine}
        shares = hvd.allgather_object(simulated, name="simulated")
        simulated = {run: steps for share in shares for run, steps in share.items()}
        for step in range(steps):
            for run, trainee, updates in self.exchange_all(everyone, step):
                largest = cases.tolerance(*run, hvd.size(), step + 1)
                expected, memories, decisions = simulated[run][step]
                cases.assert_close(updates, expected, largest, (run, step))
                what_happened(run, trainee, step, decisions)
                if step % 2:  # a memory that nobody looks at may take another way into the next step
                    memory = memories[hvd.rank()]
                    cases.assert_close(trainee.state().memory, memory, largest, (run, step, "memory"), expected)
        assert all(trainee.state().steps == steps for trainee in everyone.values())

    def _compare_stats(self, run, trainee, step, decisions):
        config, dtype = run
        stats = trainee.stats()
        if decisions:
            assert {t.name: t.decisions for t in stats.tensors if t.compressed} == decisions, (run, step)
        else:
            shapes, itemsize = cases.SHAPES.values(), np.dtype(dtype).itemsize
            traffic = config.traffic(shapes, self._hvd.size(), itemsize, step, self._matrix_shape)
            assert (stats.bytes_sent, stats.bytes_received) == traffic, (run, step, traffic)

    def one_step_from_an_equal_state(self):
        """After the 20 steps: rounding has not grown since the step before."""
        hvd = self._hvd
        if self._trained is None:  # it was not selected, or failed
            self.a_run_of_20_steps()
        everyone = self._trained
        for step in range(20, 22):
            mine = {run: trainee.state() for run, trainee in everyone.items()}
            all_states = hvd.allgather_object(mine, name="states")
            for (config, dtype), trainee, updates in self.exchange_all(everyone, step):
                largest = cases.tolerance(config, dtype, hvd.size(), 1)
                gradients = [cases.gradients(step, w, dtype) for w in range(hvd.size())]
                states = [states[config, dtype] for states in all_states]
                expected = reference.simulate(gradients, states, config, self._matrix_shape)[0]
                cases.assert_close(updates, expected, largest, (config, dtype, step))
                memory = states[hvd.rank()].memory
                cases.assert_close(trainee.state().memory, memory, largest, (config, dtype, step, "memory"), expected)

    def any_shapes(self, examples=12):
        hvd = self._hvd
        shapes = st.lists(st.integers(1, 40), min_size=0, max_size=4).filter(lambda shape: np.prod(shape) <= 10_000)

        # The same on all workers of a launch, others in each launch.
        @seed(10 * hvd.size() + hvd.mpi_enabled())
        @settings(max_examples=examples, deadline=None, database=None)
        @given(
            st.lists(shapes, min_size=1, max_size=5),
            st.sampled_from(cases.DTYPES),
            st.integers(1, 6),
            st.integers(1, 3),
        )
        def holds(shapes, dtype, rank, half_steps):
            named = {f"v{i}": tuple(shape) for i, shape in enumerate(shapes)}
            config = PowerSGD(rank=rank, num_iters_per_step=half_steps, min_compression_rate=1)
            trainee = self._trainee(config, dtype, named)
            gradients = [cases.gradients(0, w, dtype, named) for w in range(hvd.size())]
            states = [reference.State() for _ in gradients]
            expected = reference.simulate(gradients, states, config, self._matrix_shape)[0]
            trainee.start(gradients[hvd.rank()])
            updates = trainee.finish()
            largest = cases.tolerance(config, dtype, hvd.size(), 1)
            failure = None
            try:
                cases.assert_close(updates, expected, largest, named)
                memory = states[hvd.rank()].memory
                cases.assert_close(trainee.state().memory, memory, largest, (named, "memory"), expected)
            except AssertionError as error:
                failure = str(error)
            # Found on one worker, known to all: hypothesis must take the same path on each.
            assert not any(hvd.allgather_object(failure, name="failure")), failure

        holds()

    def the_mean_of_all_workers_is_kept_in_half_precision(self):
        hvd, config = self._hvd, PowerSGD(rank=2, wire_dtype="float16")
        trainee = self._trainee(config, "float32")
        given_sum, update_sum = 0, 0
        for step in range(30):
            gradients = [cases.gradients(step, w, "float32")["linear"] for w in range(hvd.size())]
            given_sum = given_sum + np.mean(gradients, axis=0)
            trainee.start(cases.gradients(step, hvd.rank(), "float32"))
            update_sum = update_sum + trainee.finish()["linear"]
        memory = np.mean(hvd.allgather_object(trainee.state().memory["linear"], name="memories"), axis=0)
        assert cases.error(update_sum + memory, given_sum) < 2**-11
