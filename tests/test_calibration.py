"""What calibrations make of the times that they find, in a time that is made up."""

from unittest import mock

import pytest

from horovod_powersgd import PowerSGD, calibration
from horovod_powersgd.calibration import FIRST_HALVES, MOST_BEFORE, SIZES, Calibration, _smoothed, _typical
from horovod_powersgd.layout import leading_rows
from horovod_powersgd.network import Curve

CYCLE, TRAVEL, TICK = 1_000_000, 100_000, 10_000  # nanoseconds


class Time:
    """Goes on by a tick when somebody looks, and where something takes time."""

    def __init__(self):
        self.now = self.computed = 0

    def perf_counter(self):
        self.now += TICK
        return self.now / 1e9

    def nanoseconds(self, run, clock=None):
        clock = clock or (lambda: self.now)
        begin = clock()
        run()
        return clock() - begin


class Made(Calibration):
    """Of two workers that share a core: what a step computes takes twice as long. Messages begin with a cycle."""

    count, index, on_processor = 2, 0, True
    matrix_shape = staticmethod(leading_rows)

    def __init__(self, time, shapes):
        self.time, self.shapes, self.clock = time, shapes, lambda: time.computed
        self.sent, self.order = [], []

    def largest(self, numbers):
        if numbers == [0]:
            self.order.append("together")
        return list(numbers)

    def step(self, nanoseconds):
        def run():
            self.time.computed += nanoseconds
            self.time.now += 2 * nanoseconds

        return run

    def _step(self, compressor, shapes, workers):
        return self.step(sum(n * m for n, m in shapes))

    def _begin_average(self, dtype, nbytes, parts):
        self.sent.append((dtype, nbytes, parts))
        self.order.append("sent")

        def wait():
            self.time.now += -self.time.now % CYCLE + TRAVEL + nbytes // 8

        return wait

    def _gather(self, share, nbytes):
        self._average("float32", nbytes)

    def _exchange(self, whom, nbytes, adds=True):
        self._average("float32", nbytes)

    def _renew(self, dtype, nbytes):
        self.order.append("renewed")
        return True


@pytest.fixture
def made():
    time = Time()
    with mock.patch.multiple(calibration, time=time, _nanoseconds=time.nanoseconds):
        yield lambda *shapes: Made(time, shapes)


def test_steps_take_what_they_take_while_others_have_the_core(made):
    found = made((64, 64))
    steps = [found.step(200_000), found.step(3_000_000)]
    # At the end of some turns is a message, whose wait may be longer or shorter than it was alone.
    assert found.in_turn(steps) == pytest.approx([4e-4, 6e-3], rel=CYCLE / 1e7)
    found.hurries = False
    assert found.in_turn(steps) == pytest.approx([4e-4, 6e-3], rel=CYCLE / 1e8)


def test_the_work_of_a_model_is_that_of_its_matrices(made):
    found = made(*[(1000, 800)] * 4, (600, 500), (600, 500), (700, 500), (90,))
    found.hurries = False
    matrices = [(1000, 800)] * 4 + [(600, 500)] * 2 + [(700, 500)]
    seconds = 2e-9 * sum(n * m for n, m in matrices)
    assert found.work(PowerSGD(4)).seconds(matrices) == pytest.approx(seconds, rel=0.02)
    assert made((90,)).work(PowerSGD(4)) == (0, 0, 0, 0, found.bucket_bytes)


def test_messages_are_as_many_tensors_as_so_much_of_the_model_has(made):
    found = made(*[(512, 512)] * 8)
    found.on_processor = False  # on which additions would be timed, too
    found.network()
    parts = {(dtype, nbytes): number for dtype, nbytes, number in found.sent}
    assert [parts["float32", nbytes] for nbytes in (2**10, 2**20, 2**22)] == [1, 1, 4]
    assert parts["float32", 2**24] == parts["float16", 2**22] == 8
    assert made()._parts("float32", 2**20) >= 1  # of a model without tensors


def test_small_halves_take_what_they_take_in_single_precision(made):
    found = made((4096, 1024))
    found.on_processor = False
    network = found.network()
    assert [nbytes for nbytes, _ in network.halves.points] == SIZES[: SIZES.index(2**24) + 1]
    small = [point for point in network.allreduce.points if point[0] < FIRST_HALVES]
    assert small and list(network.halves.points[: len(small)]) == small
    assert [nbytes for dtype, nbytes, _ in found.sent if dtype == "float16"].count(2**10) == 1  # the first of its kind


def test_before_a_job_messages_are_renewed_each_time(made):
    found = made((64, 64))

    def measure(hurries):
        found.hurries = hurries
        found.order.clear()
        found._seconds_of(lambda: found._average("float16", 2**20), lambda: found._renew_together("float16", 2**20))
        return found.order

    # One is not timed, and all begin the others together.
    assert measure(hurries=False) == ["sent", *["renewed", "together", "sent"] * (1 + MOST_BEFORE)]
    # A job waits for no more than it has to.
    assert set(measure(hurries=True)) == {"sent"}


def test_a_long_message_takes_what_those_next_to_it_take_for_each_byte(made):
    found, luck = made((2**22, 8)), {2**20: 1.5, 2**22: 1.0, 2**24: 1.5, 2**26: 1.0}

    def average(self, dtype, nbytes, parts):
        # A step takes twice what it computes, in nanoseconds.
        return self.step(round(nbytes * luck.get(nbytes, 1.0) / 2))

    found.hurries = False
    with mock.patch.object(Made, "_begin_average", average):
        mean = found._curve(lambda nbytes: found._average("float32", nbytes))
    per_byte = [mean(nbytes) / nbytes for nbytes in SIZES]
    assert per_byte == pytest.approx([1e-9] * 3 + [1.25e-9, 4 / 3 * 1e-9, 3.5 / 3 * 1e-9, 1.25e-9], rel=1e-3)
    assert mean(2**29) == pytest.approx(1.25e-9 * 2**29, rel=1e-3)


def test_a_disturbed_first_message_spoils_no_long_one():
    points = [(2**10, 8.0), (2**14, 1.0), (2**20, 2.0), (2**22, 5.0)]
    assert _smoothed(points, 2**20)[2:] == [(2**20, pytest.approx(2.0)), (2**22, pytest.approx(5.0))]


def test_one_disturbed_time_of_a_short_message_does_not_count():
    assert _typical([1e-3, 2e-3, 1.0]) == 2e-3
    assert _typical([1e-3, 4e-3] * 10) == pytest.approx(2.5e-3)  # of many, the mean of those between
    assert _typical([1.0, 1.5, 1.5]) == pytest.approx(4 / 3)
    assert _typical([1.0, 1.5, 1.5, 1.0, 9.0]) == pytest.approx(4 / 3)


def test_waiting_for_a_cycle_hides_what_is_computed_before(made):
    found = made((64, 64))
    alone = Curve(((2**10, 1.1e-3), (2**14, 1.1e-3)))
    assert found._idle(alone) == pytest.approx(0.6 * 1.1e-3, abs=1e-4)
    # Messages that wait for nothing.
    with mock.patch.object(Made, "_begin_average", lambda self, *_: found.step(550_000)):
        assert found._idle(alone) == pytest.approx(0.0, abs=1e-4)
