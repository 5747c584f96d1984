"""Predictions follow from what was measured, by hand."""

import itertools
from collections import Counter
from unittest import mock

import pytest

from horovod_powersgd import Float16, Int8, NoCompression, PowerSGD, TopK
from horovod_powersgd.buckets import GPU_BUCKET_BYTES
from horovod_powersgd.calibration import times_of
from horovod_powersgd.cost import SAMPLE_BYTES, Work, predict, predict_plain, samples_of
from horovod_powersgd.layout import layout_of, leading_rows, trailing_columns
from horovod_powersgd.network import CYCLE_TIME, Curve, HostNetwork, Network

# A message takes a millisecond, and a nanosecond for each byte; of halves, and of a gather, two; of an alltoall, three.
MESSAGES = Network(2, *(Curve(((0, 1e-3), (1e6, 1e-3 + slope))) for slope in (1e-3, 2e-3, 2e-3, 3e-3)))
FREE = Work(0.0, 0.0)
SHAPES = [(1000, 500), (300,)]  # 2,000,000 and 1,200 bytes


def test_a_curve_goes_through_what_was_measured_and_beyond():
    curve = Curve(((100, 2.0), (0, 1.0), (200, 4.0)))
    assert [curve(nbytes) for nbytes in (0, 50, 100, 200)] == pytest.approx([1, 1.5, 2, 4])
    # What the largest message took for each byte, more or less than between the last two.
    assert curve(300) == pytest.approx(4 + 100 * 3 / 200)


def test_a_disturbed_measurement_does_not_count_where_more_bytes_took_less():
    curve = Curve(((0, 9.0), (100, 2.0), (200, 3.0)))
    assert curve(0) == 2 and curve(100) == 2 and curve(300) == pytest.approx(3.5)


def test_messages_of_a_ring():
    network = Network.of_links(4, bytes_per_second=1e9, latency=1e-5)
    assert network.allreduce(8e6) == pytest.approx(6 * (1e-5 + 2e-3))  # W - 1 rounds of a part, twice
    assert network.allgather(8e6) == pytest.approx(3 * (1e-5 + 8e-3))
    assert network.alltoall(8e6) == pytest.approx(3 * (1e-5 + 2e-3))  # to each of the others its part
    assert Network.of_links(1, 1e9, 1e-5).allreduce(1e9) == 0


def test_messages_over_links_wait_for_horovods_cycle():
    fast = Network.of_links(2, bytes_per_second=1e9, latency=1e-4)
    assert fast.allreduce(0) == fast.allreduce(8e5) == CYCLE_TIME and fast.allreduce(9e5) == pytest.approx(1.1e-3)
    assert fast.idle == pytest.approx(CYCLE_TIME - 2e-4)
    assert Network.of_links(1, 1e9, 1e-4).idle == Network.of_links(11, 1e9, 1e-4).idle == 0
    prediction = predict(SHAPES, PowerSGD(2), fast, Work(0.0, 1e-10))
    assert prediction.seconds == pytest.approx(2 * CYCLE_TIME)  # factors are small
    slow = predict(SHAPES, PowerSGD(2), Network.of_links(2, 1e6, 1e-4), Work(0.0, 1e-10))
    assert slow.idle == 0 and slow.seconds == slow.processor + slow.network


@pytest.mark.parametrize(
    "true", [Work(1e-4, 1e-9, 1e-7, 1e-3), Work(1e-4, 1e-9, 1e-7), Work(0.0, 2e-9, 0.0), Work(3e-4, 0.0, 1e-6)]
)
def test_work_is_found_from_samples(true):
    samples = [[(50, 50)] * 20, [(1000, 2000)], [(9000, 40)] * 3, [(50, 50)]]
    found = Work.fitted([(shapes, true.seconds(shapes)) for shapes in samples])
    assert found == pytest.approx(true, abs=1e-12)


def test_few_samples_tell_of_bytes_then_of_buckets_and_then_of_tensors():
    samples = [[(64, 64)] * 24, [(256, 64)] * 20, [(64, 64)]]
    for true, number in ((Work(0.0, 2.1e-10, 0.0, 7.5e-6), 2), (Work(7.5e-6, 2.1e-10, 0.0, 7.5e-6), 3)):
        found = Work.fitted([(shapes, true.seconds(shapes)) for shapes in samples[:number]])
        assert found == pytest.approx(true)
    # Where each is one tensor, a bucket is one.
    true, samples_of_one = Work(7.5e-6, 2.1e-10), [[(64, 64)], [(256, 64)], [(300, 200)]]
    for on_processor in (True, False):
        found = Work.fitted([(shapes, true.seconds(shapes)) for shapes in samples_of_one], on_processor)
        assert found == pytest.approx(true if on_processor else Work(0.0, 2.1e-10, 0.0, 7.5e-6), abs=1e-12)
    assert Work.fitted([(samples[0], 1e-3)]) == pytest.approx(Work(0, 1e-3 / (24 * 4 * 64 * 64)))


@pytest.mark.parametrize("true", [Work(1e-4, 1e-11, 0.0, 1e-3), Work(1e-4, 0.0, 0.0, 0.0), Work(0.0, 0.0, 0.0, 1e-3)])
def test_a_gpus_work_is_told_by_buckets(true):
    samples = [[(64, 64)] * 24, [(512, 512)] * 15, [(512, 4608)] * 3, [(64, 64)]]
    found = Work.fitted([(shapes, true.seconds(shapes)) for shapes in samples], on_processor=False)
    assert found == pytest.approx(true, abs=1e-12)
    assert found.seconds([(512, 512)] * 60, 2) == pytest.approx(true.per_bucket + true.seconds([(512, 512)] * 60))


def test_waiting_for_a_cycle_hides_what_was_computed_before():
    waiting, work = MESSAGES._replace(idle=8e-4), Work(1e-3, 0.0)
    once, plain = predict(SHAPES, PowerSGD(2), MESSAGES, work), predict_plain([(300,)], waiting)
    twice = predict(SHAPES, PowerSGD(2), waiting, work)  # P and Q
    assert twice.seconds == pytest.approx(once.seconds - 1e-3)
    waited = 1.6e-3 - (once.network - 2e-3)  # less than a cycle each, by what they travel
    assert twice.step(9.0) == pytest.approx(9 + once.seconds - waited, rel=1e-9)
    assert plain.idle == pytest.approx(8e-4, rel=0.01)
    assert plain.seconds == plain.step(5e-4) == pytest.approx(plain.step(1e-3) - (1e-3 - plain.idle))
    # What takes much longer than a cycle waits for none.
    assert predict_plain(SHAPES, waiting).step(5e-4) == predict_plain(SHAPES, waiting).seconds + 5e-4


def test_what_is_measured_in_a_job_is_not_repeated_where_it_takes_long():
    asked = []

    def largest(numbers):
        asked.append(len(numbers))
        return [10**6 * next(milliseconds) for _ in numbers]

    milliseconds = iter([50])
    assert times_of(lambda: None, 0.01, largest) == [0.05]
    milliseconds = iter([2, 15, 2, 3, 4, 5])
    assert times_of(lambda: None, 0.01, largest) == [0.015, 0.002, 0.003, 0.004, 0.005]
    assert asked == [1, 1, 5]
    milliseconds = iter([50, 30, 40])
    assert times_of(lambda: None, 0.01, largest, least=3) == [0.05, 0.03, 0.04]
    milliseconds, renewed = itertools.repeat(1), mock.Mock()
    assert times_of(lambda: None, 0.01, largest, most=8, before=renewed) == [0.001] * 8
    assert renewed.call_count == 9  # before the first, too


def test_buckets_are_as_large_as_work_says():
    large = [(1000, 1000)] * 20
    assert predict(large, PowerSGD(4), MESSAGES, FREE).buckets == 3
    assert predict(large, PowerSGD(4), MESSAGES, FREE._replace(bucket_bytes=GPU_BUCKET_BYTES)).buckets == 1


@pytest.mark.parametrize("compressor", [PowerSGD(4), PowerSGD(8, wire_dtype="int8"), Int8(), Float16()])
def test_what_is_measured_are_matrices_of_the_model(compressor):
    small, middle, large = (90, 90), (300, 300), (900, 300)
    model = [(7,), large, *[small] * 9, *[middle] * 2, (30, 10, 3, 3), (2, 2)]
    samples = samples_of(compressor, model)
    assert all(layout_of(shape, compressor).compressed for shapes in samples for shape in shapes)
    of_each = Counter(layout_of(shape, compressor).matrix for shape in model if len(shape) > 1)
    found = Counter(shape for shapes in samples for shape in shapes)
    *thirds, [alone] = samples
    assert (found - Counter([alone])).items() <= of_each.items() and {small, middle, large} <= found.keys()
    assert len(thirds) == 3 and large in thirds[-1] and alone == max(thirds, key=len)[0]
    assert max(map(len, samples_of(compressor, model, most=2))) == 2


def test_a_sample_has_its_bytes_at_most():
    model = [(30_000, 1000), *[(1000, 3000)] * 4, *[(1000, 1000)] * 9]
    samples = samples_of(PowerSGD(4), model)
    assert [len(shapes) for shapes in samples] == [4, 1, 1, 1] and samples[2] == [(SAMPLE_BYTES // 4 // 1000, 1000)]
    samples = samples_of(PowerSGD(4), model, nbytes=2 * SAMPLE_BYTES)
    assert [len(shapes) for shapes in samples] == [8, 2, 1, 1] and samples[2] == [(SAMPLE_BYTES // 2 // 1000, 1000)]
    assert samples_of(Int8(), [(3, 10**7)], leading_rows) == [[(3, SAMPLE_BYTES // 4 // 3)]]
    assert samples_of(PowerSGD(4), [(9,)]) == [] and Work.fitted([]) == Work(0, 0)
    assert samples_of(PowerSGD(4), [(5, 6, 90)], trailing_columns) == [[(30, 90)]]


def test_no_part_of_the_work_is_negative():
    # Small ones that take no time at all: a fit would give tensors less than nothing.
    found = Work.fitted([([(50, 50)] * 20, 1e-9), ([(1000, 2000)], 1e-2), ([(9000, 40)] * 3, 9e-3)])
    assert min(found) >= 0


def test_what_travels_as_it_is_makes_one_message():
    for prediction in (predict_plain(SHAPES, MESSAGES), predict(SHAPES, NoCompression(), MESSAGES, FREE)):
        assert prediction.seconds == pytest.approx(1e-3 + 2.0012e-3)
        assert (prediction.compressed, prediction.bytes_sent, prediction.memory) == (0, 2_001_200, 0)


def test_halves_take_casts():
    prediction = predict_plain(SHAPES, MESSAGES, casts=Work(0.0, 1e-9))
    assert prediction.network == pytest.approx(1e-3 + 2 * 1.0006e-3)
    assert prediction.processor == pytest.approx(2.0012e-3) and prediction.bytes_sent == 1_000_600


def test_factors_make_a_message_for_each_half_step():
    prediction = predict(SHAPES, PowerSGD(2), MESSAGES, Work(1e-4, 1e-9, 1e-7))
    # P, with the vector, and Q.
    assert prediction.network == pytest.approx(2e-3 + (2 * 1500 * 4 + 1200) * 1e-9)
    assert prediction.processor == pytest.approx(1e-4 + 2e6 * 1e-9 + 1500 * 1e-7)
    assert prediction.seconds == pytest.approx(prediction.network + prediction.processor)  # one bucket hides nothing
    assert prediction.bytes_sent == 2 * 1500 * 4 + 1200 and prediction.memory == 2_000_000
    assert predict(SHAPES, PowerSGD(2, memory_dtype="bfloat16"), MESSAGES, FREE).memory == 1_000_000


@pytest.mark.parametrize(
    "compressor, seconds",
    [
        (PowerSGD(2, num_iters_per_step=1), [1e-3 + (2 * 500 * 4 + 1200) * 1e-9, 1e-3 + (2 * 1000 * 4 + 1200) * 1e-9]),
        (PowerSGD(2, wire_dtype="float16"), [3e-3 + 2 * 1500 * 2 * 2e-9 + 1200e-9]),
        (PowerSGD(2, wire_dtype="int8"), [3e-3 + (2 * 1500 + 4 * 4) * 2e-9 + 1200e-9]),
        (Int8(1000), [2e-3 + (500_000 + 500 * 4) * 2e-9 + 1200e-9]),
        (Float16(), [2e-3 + 1_000_000 * 2e-9 + 1200e-9]),
        (TopK(0.01), [2e-3 + 5000 * 8 * 2e-9 + 1200e-9]),
    ],
)
def test_each_kind_of_message_has_its_own_time(compressor, seconds):
    assert any(predict(SHAPES, compressor, MESSAGES, FREE).network == pytest.approx(s) for s in seconds)


def test_numbers_in_8_bits_are_averaged_in_slices_by_many():
    four = MESSAGES._replace(workers=4)
    # An alltoall of the slices, and a gather of one.
    one = 125_000 + 125 * 4
    assert predict(SHAPES[:1], Int8(1000), four, FREE).network == pytest.approx(2e-3 + 4 * one * 3e-9 + one * 2e-9)


def test_links_of_hosts():
    # 4 hosts of 2. Inside, half of a message goes to the other one; over a link come a quarter of it, of both, 3 times.
    network = Network.of_links(8, bytes_per_second=1e9, latency=1e-5, per_host=2, in_host=(8e9, 4e9))
    assert network.hosts.gradients(8e6) == pytest.approx(1e-5 + 4e6 / 8e9)
    assert network.hosts.inside(8e6) == pytest.approx(1e-5 + 4e6 / 4e9)
    assert network.hosts.between(8e6) == pytest.approx(3 * (1e-5 + 2 * 2e6 / 1e9))
    assert network._replace(hosts=None) == Network.of_links(8, 1e9, 1e-5)
    assert Network.of_links(8, 1e9, 1e-5, per_host=8).hosts is None  # all on one


# 2 hosts of 2. Gradients take a tenth of a nanosecond for each byte. Inside a message takes a tenth of a millisecond,
# and half a nanosecond for each byte; between, 3 and 3.
GRADIENTS, INSIDE = Curve(((0, 0), (1e6, 1e-4))), Curve(((0, 1e-4), (1e6, 6e-4)))
BETWEEN = Curve(((0, 3e-3), (1e6, 6e-3)))
ON_HOSTS = MESSAGES._replace(workers=4, hosts=HostNetwork(2, GRADIENTS, INSIDE, BETWEEN))


def test_two_levels_share_half_steps_and_memory():
    prediction = predict(SHAPES, PowerSGD(2, hierarchical=True), ON_HOSTS, Work(1e-4, 1e-9, 1e-7))
    # The gradients, and twice the host's Q; P, with the vector, and Q.
    inside = 2e6 * 1e-10 + (1e-4 + 2 * 4000 * 5e-10) + 2 * (1e-3 + 4e-9)
    assert prediction.network == pytest.approx(inside + 2e-3 + (2 * 1500 * 4 + 1200) * 1e-9)
    # Two half-steps on half of the rows, and the update: two of three passes.
    assert prediction.processor == pytest.approx(1e-4 + 2 / 3 * 2e6 * 1e-9 + 1500 * 1e-7)
    assert prediction.bytes_sent == 2 * 1500 * 4 + 1200 and prediction.memory == 1_000_000
    unremembered = predict(SHAPES, PowerSGD(2, hierarchical=True, error_feedback=False), ON_HOSTS, FREE)
    assert unremembered.memory == 0
    assert prediction.network - unremembered.network == pytest.approx(1e-4 + 2 * 4000 * 5e-10)


def test_the_largest_share_of_a_memory_counts():
    assert predict([(1001, 500)], PowerSGD(2, hierarchical=True), ON_HOSTS, FREE).memory == 4 * 501 * 500


@pytest.mark.parametrize("workers, rounds", [(4, 1), (8, 2)])
def test_two_levels_in_8_bits(workers, rounds):
    network = ON_HOSTS._replace(workers=workers)
    prediction = predict(SHAPES, PowerSGD(2, wire_dtype="int8", hierarchical=True), network, FREE)
    inside, between = 2e6 * 1e-10 + 2 * (1e-3 + 4e-9), 0.0
    for length in (1000, 500):
        inside += 1e-4 + 2 * (4 * 2 * length) * 5e-10  # each one's factors to both
        # Codes and units: of two hosts, all to both; of four, a quarter, which has a unit of one or two columns.
        codes = {4: 2 * length + 8, 8: 2 * length // 4 + 4}[workers]
        message = workers // 2 * codes // 2
        between += rounds * (3e-3 + message * 3e-9)
        inside += rounds * (1e-4 + 2 * message * 5e-10)
    assert prediction.network == pytest.approx(inside + between + 1e-3 + 1200e-9)


def test_one_level_where_no_hosts_are_known():
    asked, flat = PowerSGD(2, hierarchical=True), PowerSGD(2)
    assert predict(SHAPES, asked, MESSAGES, Work(1e-4, 1e-9)) == predict(SHAPES, flat, MESSAGES, Work(1e-4, 1e-9))
    assert predict(SHAPES, flat, ON_HOSTS, FREE).network == predict(SHAPES, flat, MESSAGES, FREE).network


def test_the_shorter_kind_of_work_is_hidden_but_for_one_buckets_part():
    shapes = [(2000, 4000)] * 4  # 32 MB each: a bucket each
    prediction = predict(shapes, PowerSGD(4), MESSAGES, Work(1e-2, 0.0))
    assert prediction.buckets == 4
    assert prediction.processor == pytest.approx(4e-2) and prediction.network > 0
    assert prediction.seconds == pytest.approx(4e-2 + prediction.network / 4)


def test_a_step_hides_messages_behind_backward():
    prediction = predict([(2000, 4000)] * 4, PowerSGD(4), MESSAGES, Work(1e-2, 0.0))
    assert prediction.step(1.0) == pytest.approx(1.0 + 4e-2 + prediction.network / 4)
    slow = MESSAGES._replace(allreduce=Curve(((0, 10.0), (1e9, 10.0))))
    # A quarter of computing comes before the first message.
    found = predict([(2000, 4000)] * 4, PowerSGD(4), slow, Work(1e-2, 0.0))
    assert found.step(1.0) == pytest.approx(1.04 / 4 + 80.0)


def test_less_is_hidden_where_messages_keep_the_same_cores_busy():
    shapes, work = [(2000, 4000)] * 4, Work(1e-2, 0.0)
    nothing, half = (predict(shapes, PowerSGD(4), MESSAGES._replace(overlap=o), work) for o in (0.0, 0.5))
    assert nothing.step(1.0) == pytest.approx(1.0 + 4e-2 + nothing.network)
    assert half.step(1.0) == pytest.approx(1.0 + 4e-2 + (1 - 0.5 * 3 / 4) * half.network)
    assert predict_plain(shapes, MESSAGES._replace(overlap=0.5)).overlap == 0.5


def test_tensors_can_be_left_as_they_are():
    prediction = predict([(1000, 500), (800, 500)], PowerSGD(2), MESSAGES, FREE, plain=[1])
    assert (prediction.compressed, prediction.memory) == (1, 2_000_000)
    assert prediction.bytes_sent == 2 * 1500 * 4 + 1_600_000
