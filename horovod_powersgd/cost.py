"""What one exchange takes, predicted from what a calibration has measured, in plain numpy.

An exchange is two kinds of work that go on side by side: a processor's, which is passes over the gradients and what
each tensor and each bucket cost, and the network's, which is messages one after the other. A bucket's factors are
computed before they are sent, and so the shorter kind is hidden behind the longer one but for one bucket's part; less
of it, where a worker's messages keep the same cores busy (Network.overlap). Of one bucket, messages wait for Horovod's
next cycle, which hides what was computed before them (Network.idle).

In two levels (PowerSGD.hierarchical) a worker's half-steps take a share of the rows, and messages inside its host are
added. What is left out: that a tensor takes more calls there; that in PyTorch a host's last factor goes round only
where it is Q; and, of one level in 8 bits, that the slices of all workers of a host go over its link.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from horovod_powersgd.buckets import BUCKET_BYTES, sort_into_buckets
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.precision import HOROVODS_FP16, Float16, is_horovods_fp16
from horovod_powersgd.layout import Layout, layout_of, leading_rows
from horovod_powersgd.network import HostNetwork, Network
from horovod_powersgd.quantization import Slices, slice_count

ITEMSIZE = 4  # gradients are float32 here
# A sample of a model has so many bytes, and so many matrices, at most, since a calibration has seconds; before a job as
# many bytes as a bucket. Together samples have more of them than a processor's caches, as a large model has.
SAMPLE_BYTES, SAMPLE_BYTES_BEFORE, SAMPLE_MATRICES = 2**24, BUCKET_BYTES, 24


def samples_of(
    compressor: Compressor,
    shapes: Iterable[tuple[int, ...]],
    matrix_shape: Callable = leading_rows,
    most: int = SAMPLE_MATRICES,
    nbytes: int = SAMPLE_BYTES,
) -> list[list[tuple[int, int]]]:
    """Matrices whose steps tell what a compressor takes: of those of a model that it compresses the small ones, those
    between, and the large ones; and of the sample that has most of them the first one alone, which tells what a bucket
    takes from what each tensor does.

    Args:
        compressor: the configuration.
        shapes: of the model's tensors.
        matrix_shape: as layout_of's.
        most: how many matrices there are in a sample.
        nbytes: that they have together.
    """
    layouts = [layout_of(shape, compressor, matrix_shape) for shape in shapes]
    numbers = Counter(layout.matrix for layout in layouts if layout.compressed)
    by_size = sorted(numbers, key=math.prod)
    thirds = [by_size[i * len(by_size) // 3 : (i + 1) * len(by_size) // 3] for i in range(3)]
    samples = [_some({shape: numbers[shape] for shape in third}, most, nbytes) for third in thirds if third]
    longest = max(samples, key=len, default=[])
    return [*samples, longest[:1]] if len(longest) > 1 else samples


def _some(numbers: dict[tuple[int, int], int], most: int, nbytes: int) -> list[tuple[int, int]]:
    """Some of so many matrices of each shape, of each at least one where there is room; what is too large is cut."""
    in_turn = [shape for i in range(max(numbers.values())) for shape, number in numbers.items() if number > i]
    found: list[tuple[int, int]] = []
    room = nbytes // ITEMSIZE
    for n, m in in_turn[:most]:
        if found and n * m > room:
            break
        found.append((min(n, max(1, room // m)), m) if n >= m else (n, min(m, max(1, room // n))))
        room -= n * m
    return found


class Work(NamedTuple):
    """What a compressor's step takes of a processor, without messages.

    Attributes:
        per_tensor: seconds for each tensor that is compressed.
        per_byte: seconds for each of its bytes.
        per_side: seconds for each of a matrix's rows and columns: what is done to factors.
        per_bucket: seconds for each bucket: Python's, and what asks a GPU for all of its tensors at once.
        bucket_bytes: that a bucket has.
    """

    per_tensor: float
    per_byte: float
    per_side: float = 0.0
    per_bucket: float = 0.0
    bucket_bytes: int = BUCKET_BYTES

    @classmethod
    def fitted(
        cls, samples: Iterable[tuple[Sequence[tuple[int, int]], float]], on_processor: bool = True
    ) -> "Work":
        """From what steps of some matrices have taken.

        Args:
            samples: (shapes, seconds), a bucket each, which tell the more, the more they differ. Without any, nothing
                takes any time.
            on_processor: else on a GPU, where calls take time, and sides none.
        """
        samples = list(samples)
        if not samples:
            return cls(0.0, 0.0)
        rows, seconds = zip(*((_amounts(shapes, 1), taken) for shapes, taken in samples), strict=True)
        # Each sample counts by its part of what it took; no part may be negative, which noise would make it.
        weighted = np.array(rows) / np.array(seconds)[:, None]
        # Few samples tell few parts; bytes first, or buckets.
        used = [1, 3, 0, 2] if on_processor else [3, 0, 1]
        if all(len(shapes) == 1 for shapes, _ in samples):  # a bucket is a tensor
            used.remove(3 if on_processor else 0)
        used = used[: len(samples)]
        while used:
            found = np.linalg.lstsq(weighted[:, used], np.ones(len(seconds)), rcond=None)[0]
            if (found >= 0).all():
                break
            del used[int(np.argmin(found * weighted[:, used].max(0)))]
        parts = dict(zip(used, found.tolist(), strict=True))
        return cls(*(parts.get(i, 0.0) for i in range(4)))

    def seconds(self, shapes: Sequence[tuple[int, int]], buckets: int = 1) -> float:
        """Of a step of these matrices, in so many buckets."""
        return float(np.dot(_amounts(shapes, buckets), self[:4]))


def _amounts(shapes: Sequence[tuple[int, int]], buckets: int) -> tuple[int, int, int, int]:
    return len(shapes), ITEMSIZE * sum(n * m for n, m in shapes), sum(n + m for n, m in shapes), buckets


class Prediction(NamedTuple):
    """What one exchange is predicted to take.

    Attributes:
        processor: seconds of it that a processor works; network: that messages take.
        idle: seconds of these in which they wait for Horovod's next cycles, and nothing else travels.
        overlap: Network.overlap.
        compressed: how many tensors travel compressed.
        buckets: how many.
        bytes_sent: that a worker hands to Horovod; in two levels, those that stay in its host do not count.
        memory: bytes of error feedback that a worker keeps; in two levels, the largest share of them.
    """

    processor: float
    network: float
    idle: float
    overlap: float
    compressed: int
    buckets: int
    bytes_sent: int
    memory: int

    @property
    def seconds(self) -> float:
        """From the last gradient's arrival to the last update, where all gradients come at once."""
        return self.step(0.0)

    def step(self, backward: float) -> float:
        """Seconds of a step whose backward takes so long: a processor does one thing at a time, messages travel
        meanwhile, but for one bucket's."""
        on_processor = backward + self.processor
        beside = self.overlap * min(on_processor, self.network) * (1 - 1 / max(self.buckets, 1))
        return on_processor + self.network - max(beside, min(on_processor, self.idle))


@dataclass
class _Tensor:
    """A gradient, as buckets see it (buckets.Sendable)."""

    name: str
    kind: Hashable
    nbytes: int
    compressed: bool
    layout: Layout


def predict(
    shapes: Sequence[tuple[int, ...]],
    compressor: Compressor,
    network: Network,
    work: Work,
    matrix_shape: Callable = leading_rows,
    plain: Collection[int] = (),
) -> Prediction:
    """What an exchange of gradients of these shapes takes, in single precision, in an ordinary step.

    Args:
        shapes: of all tensors.
        compressor: of those that it compresses. The exchange has two levels where it asks for them, and the network
            knows of hosts.
        network: between the workers.
        work: of the compressor, in one level.
        matrix_shape: as layout_of's.
        plain: which tensors, by their places, travel as they are though it would compress them.
    """
    if is_horovods_fp16(compressor):
        return predict_plain(shapes, network, work, matrix_shape)
    layouts = [layout_of(shape, compressor, matrix_shape) for shape in shapes]
    tensors = [
        _Tensor(str(i), "", ITEMSIZE * math.prod(layout.shape), layout.compressed and i not in plain, layout)
        for i, layout in enumerate(layouts)
    ]
    buckets = sort_into_buckets(tensors, bucket_bytes=work.bucket_bytes)
    hosts = network.hosts if compressor.family.hierarchical else None
    per_host = 1 if hosts is None else hosts.per_host
    at_once, messages, of_matrices = 0, list[float](), 0
    for bucket in buckets:
        as_it_is = sum(tensor.nbytes for tensor in bucket if not tensor.compressed)
        matrices = [tensor.layout.matrix for tensor in bucket if tensor.compressed]
        if matrices:
            messages += _messages(matrices, as_it_is, compressor, network, hosts)
            of_matrices += 1
        else:
            at_once += as_it_is
    # What is averaged as it is, and is there at once, Horovod puts into one message.
    messages += [network.allreduce(at_once)] if at_once else []
    compressed = [tensor.layout.matrix for tensor in tensors if tensor.compressed]
    on_processor = _of_share(work, compressor, per_host).seconds(compressed, of_matrices) if compressed else 0.0
    step, workers = compressor.warmup_steps + 1, network.workers
    of_these = [tensor.layout.shape for tensor in tensors if tensor.compressed]
    sent = compressor.traffic(of_these, workers, ITEMSIZE, step, matrix_shape, per_host).sent
    sent += sum(tensor.nbytes for tensor in tensors if not tensor.compressed) if workers > 1 else 0
    itemsize = 2 if compressor.family.memory_dtype else ITEMSIZE
    memory = itemsize * sum(-(-n // per_host) * m for n, m in compressed) if compressor.keeps_memory else 0
    overlap, number = network.overlap, len(buckets)
    idle = _idle(messages, network) if len(buckets) == 1 else 0.0
    return Prediction(on_processor, sum(messages), idle, overlap, len(compressed), number, sent, memory)


def predict_plain(
    shapes: Sequence[tuple[int, ...]],
    network: Network,
    casts: Work | None = None,
    matrix_shape: Callable = leading_rows,
) -> Prediction:
    """What an exchange by Horovod's own code takes: all gradients as they are, or in half precision.

    Args:
        shapes: of all tensors.
        network: between the workers.
        casts: to half precision and back. None: as they are.
        matrix_shape: as layout_of's.
    """
    nbytes = ITEMSIZE * sum(map(math.prod, shapes))
    if casts is None:
        on_network, on_processor, sent = network.allreduce(nbytes), 0.0, nbytes
    else:
        on_network, sent = network.halves(nbytes // 2), nbytes // 2
        matrices = [layout_of(shape, HOROVODS_FP16, matrix_shape).matrix for shape in shapes]
        on_processor = casts.seconds(matrices)
    # Horovod sends what is there.
    buckets = max(1, math.ceil(nbytes / BUCKET_BYTES))
    idle = _idle([on_network], network) if buckets == 1 else 0.0
    return Prediction(on_processor, on_network, idle, network.overlap, 0, buckets, sent, 0)


def _idle(messages: Iterable[float], network: Network) -> float:
    """Of messages that take so many seconds: what takes longer than a cycle anyway does not wait for the next one."""
    shortest = network.allreduce(0)
    return sum(max(0.0, network.idle - max(0.0, seconds - shortest)) for seconds in messages)


def _of_share(work: Work, compressor: Compressor, per_host: int) -> Work:
    """Of a worker whose half-steps take one of so many shares of the rows. Its update has all rows, and its bases are
    those of whole factors."""
    half_steps = len(compressor.round_bytes(1, 1, ITEMSIZE, compressor.warmup_steps + 1))
    return work._replace(per_byte=work.per_byte * (half_steps / per_host + 1) / (half_steps + 1))


def _messages(
    matrices: Sequence[tuple[int, int]],
    plain: int,
    compressor: Compressor,
    network: Network,
    hosts: HostNetwork | None,
) -> list[float]:
    """Seconds that each of a bucket's messages takes, one after the other.

    Args:
        plain: bytes of what travels as it is, with the first of them.
        hosts: None in an exchange of one level.
    """
    step, seconds = compressor.warmup_steps + 1, list[float]()
    if hosts is not None:
        # A message says that they are there, and another one that they have been read.
        there = read = network.allreduce(ITEMSIZE)
        seconds += [there + hosts.gradients(ITEMSIZE * sum(n * m for n, m in matrices)), read]
    rounds = list(zip(*(compressor.quantized_rows(n, m, step) for n, m in matrices), strict=True))
    as_it_is = [network.allreduce(plain)] if plain else []
    if rounds:
        for lengths in rounds:
            seconds += _mean_in_8_bits(list(itertools.chain(*lengths)), network, hosts)
        return seconds + as_it_is
    halves = compressor.sends_halves(step) or isinstance(compressor.family, Float16)
    collective = (network.halves if halves else network.allreduce) if compressor.linear else network.allgather
    by_matrix = [compressor.round_bytes(n, m, ITEMSIZE, step) for n, m in matrices]
    sizes = [sum(some) for some in zip(*by_matrix, strict=True)]
    if hosts is not None and compressor.keeps_memory:
        # Each worker tells the others of its host its part of the last factor.
        seconds.append(hosts.inside(hosts.per_host * sizes[-1]))
    if collective is network.allreduce:
        sizes[0] += plain
    else:
        seconds += as_it_is
    return seconds + [collective(size) for size in sizes]


def _mean_in_8_bits(lengths: Sequence[int], network: Network, hosts: HostNetwork | None) -> list[float]:
    """Seconds of each message of an average of rows of such lengths."""
    if hosts is None:
        count = slice_count(network.workers)
        nbytes = Slices(lengths, count).nbytes(ITEMSIZE)
        gathered = network.allgather(nbytes)
        return [gathered] if count == 1 else [network.alltoall(count * nbytes), gathered]
    per_host, number = hosts.per_host, network.workers // hosts.per_host
    count = slice_count(number)
    # A host's workers tell each other their parts, as they are. Of the codes each sends a part of every message to one
    # worker of each host, who tells it to the others there.
    message = number * -(-Slices(lengths, count).nbytes(ITEMSIZE) // per_host)
    one_round = [hosts.between(message), hosts.inside(per_host * message)]
    return [hosts.inside(per_host * ITEMSIZE * sum(lengths)), *one_round * (1 if count == 1 else 2)]
