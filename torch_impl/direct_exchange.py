"""The exchange of a step whose gradients all travel as they are, or all in half precision."""

import threading
import time
from collections.abc import Mapping

import torch

from horovod_powersgd.choosing import CYCLE
from horovod_powersgd.torch.direct_means import DirectMeans
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.joint_means import JointMeans
from horovod_powersgd.torch.streams import Streams
from horovod_powersgd.torch.workers import Workers

# Gradients leave together where all have so many bytes at most: to copy more takes longer than the calls that it saves.
JOINT_BYTES = 2_500_000


class DirectExchange:
    """What an Engine does for gradients of which nothing is kept, in a fraction of its calls, which are most of what a
    step of a small model takes: no buckets, no verdict.

    Gradients that are small together, and come one soon after the other, leave in one message when the last is there:
    Horovod would put them into one anyway. Others leave as they come.

    Args:
        workers: that average.
        streams: that the step's work is queued in.

    Attributes:
        under_way: whether a step has begun, and not ended.
        span: seconds from the last step's first gradient to its finish, without what was done here meanwhile.
        gradients: of the step, by their parameters.
        uncompressed_bytes: of all of them.
    """

    def __init__(self, workers: Workers, streams: Streams):
        self._streams = streams
        self._lock = threading.Lock()
        self._single, self._joint = DirectMeans(workers), JointMeans(workers)
        self._means: DirectMeans | JointMeans = self._single
        # The gradients that all of the following is for, and what of them may change; None: it is to be made anew.
        self._packed: tuple[tuple[PlainGradient, ...], list] | None = None
        self.gradients: Mapping[torch.nn.Parameter, PlainGradient] = {}
        self._are_small = self._on_gpu = False
        self.uncompressed_bytes = 0
        self._begun = self._taken = self.span = 0.0
        self.under_way = False
        self._come_at_once = True

    def expect(self, span: float) -> None:
        """From the next step on gradients come within so many seconds: the same on all workers."""
        self._come_at_once = span <= CYCLE

    def begin(self, gradients: tuple[PlainGradient, ...]) -> None:
        """Begins a step of these gradients."""
        packed = gradients, [(gradient.kind, gradient.parameter.dtype) for gradient in gradients]
        if packed != self._packed:
            self._packed, self.gradients = None, {gradient.parameter: gradient for gradient in gradients}
            self._on_gpu = any(parameter.is_cuda for parameter in self.gradients)
            self.uncompressed_bytes = sum(gradient.nbytes for gradient in gradients)
            sent = sum(gradient.parameter.numel() * gradient.sent_dtype.itemsize for gradient in gradients)
            self._are_small = sent <= JOINT_BYTES
            self._joint.pack(gradients if self._are_small else ())
            self._packed = packed
        self._means = self._joint if self._come_at_once and self._are_small else self._single
        self._joint.begin()
        self._begun, self._taken, self.under_way = time.perf_counter(), 0.0, True

    def arrived(self, parameter: torch.nn.Parameter, incoming: torch.Tensor | None = None) -> None:
        """As Engine.arrived."""
        begun = time.perf_counter()
        gradient = self.gradients.get(parameter)
        if gradient is None or parameter.grad is None:
            return
        if self._on_gpu:
            with self._lock:
                self._streams.wait_for_current(parameter.device)
                with self._streams.current():
                    self._means.start(gradient, incoming)
        else:
            self._means.start(gradient, incoming)
        self._taken += time.perf_counter() - begun

    def finish(self, factor: float) -> int:
        """Puts all averages, times `factor`, into the gradients; as zeros take part those that are not there.

        Returns:
            The bytes that were averaged.
        """
        self.span = time.perf_counter() - self._begun - self._taken
        for device in {parameter.device for parameter in self.gradients} if self._on_gpu else ():
            self._streams.wait_for_current(device)
        with self._streams.current():
            nbytes = self._means.finish(self.gradients.values(), factor)
        self.under_way = False
        return nbytes

    def forget(self) -> None:
        """Lets go of what was begun, and has not ended."""
        if self.under_way:
            self.under_way, self._packed = False, None  # Horovod may still write to what has left
            self._single.forget()
