"""PowerSGD in two levels: the gradients of a host's workers are averaged whole, and travel as factors between hosts."""

from collections.abc import Sequence
from typing import Any

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.futures import SparseMean
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.host_sums import HostMessages, HostReadings
from horovod_powersgd.torch.peers import Peers
from horovod_powersgd.torch.powersgd_bucket import PowerSGDBucket
from horovod_powersgd.torch.quantization import quantized_mean
from horovod_powersgd.torch.senders import Hosts
from horovod_powersgd.torch.step import Step
from horovod_powersgd.torch.two_level_gradient import TwoLevelGradient
from horovod_powersgd.torch.workers import Workers


class TwoLevelBucket(PowerSGDBucket):
    """A PowerSGDBucket whose matrices are first averaged among the workers of a host, each of which then works on a
    share of their rows. That takes one round more; and one small message beside the last, where that makes Q: for the
    memory each worker has to know the host's part of Q, not only its own rows'. Factors in 8 bits are a host's: its
    workers first tell each other what their rows have made of them."""

    def __init__(
        self,
        name: str,
        gradients: Sequence[PlainGradient],
        workers: Workers,
        config: Compressor,
        host: Host,
        peers: Peers | None,
    ):
        super().__init__(name, gradients, workers, config)
        self._host, among = host, (name, workers, config, host)
        self._sums = HostMessages(*among) if peers is None else HostReadings(*among, peers)

    @property
    def _worker(self) -> int:
        return self._host.number

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        half_steps = self._start(step)
        dense = yield from self._begin(self.gradients, step, sparse)
        matrices = [gradient for gradient in dense if isinstance(gradient, TwoLevelGradient)]
        if matrices:
            yield from self._sums.take_shares(matrices, step)
        finite: list[torch.Tensor] = []
        for half_step in range(half_steps):
            if matrices:
                self._multiply(matrices)
            sent = [gradient.part() for gradient in matrices]
            senders = matrices if half_step else dense
            is_last_q = half_step == half_steps - 1 and matrices and not matrices[0].mean_is_q
            tells = is_last_q and self._config.keeps_memory and self._config.linear
            told: Any = self._sums.tell_own(matrices, step) if tells else None
            sent += [gradient.send() for gradient in senders[len(matrices) :]]
            finite += yield from self._average(senders, sent, step, half_step, in_place=True)
            if tells:
                yield from self._sums.take_own(matrices, told)
        return finite

    def _quantized_mean(self, flat: torch.Tensor, rows: Sequence[tuple[int, int]], name: str, step: Step):
        flat = yield from self._sums.total(flat, step)
        return (yield from quantized_mean(flat, rows, name, Hosts(step, self._config, self._host)))
