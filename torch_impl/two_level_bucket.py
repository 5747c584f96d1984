"""PowerSGD in two levels: the gradients of a host's workers are averaged whole, and travel as factors between hosts."""

from collections.abc import Sequence

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.bucket import joined
from horovod_powersgd.torch.futures import Gathered, SparseMean
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.peers import Peers
from horovod_powersgd.torch.powersgd_bucket import PowerSGDBucket, bases_of
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
        self._host, self._peers = host, peers

    @property
    def _worker(self) -> int:
        return self._host.number

    def _rounds(self, step: Step, sparse: dict[PlainGradient, SparseMean]):
        half_steps = self._start(step)
        for gradient in self.gradients:
            yield from self._begin(gradient, step, sparse)
        dense = [gradient for gradient in self.gradients if gradient not in sparse]
        matrices = [gradient for gradient in dense if isinstance(gradient, TwoLevelGradient)]
        if matrices:
            yield from (self._take_shares if self._peers is None else self._read_shares)(matrices, step)
        finite: bool | torch.Tensor = True
        for half_step in range(half_steps):
            bases = bases_of(matrices)
            sent = [gradient.multiply(bases[gradient]) for gradient in matrices]
            senders = matrices if half_step else dense
            own = None
            is_last_q = half_step == half_steps - 1 and matrices and not matrices[0].mean_is_q
            if is_last_q and self._config.keeps_memory and self._config.linear:
                own = self._tell(joined([gradient.own.reshape(-1) for gradient in matrices]), step)
            sent += [gradient.send() for gradient in senders[len(matrices) :]]
            finite = (yield from self._average(senders, sent, step, half_step, in_place=True)) & finite
            if own is not None:
                sums = self._sum((yield own))
                for gradient, part in zip(matrices, sums.split([gradient.factor_size for gradient in matrices])):
                    gradient.take_own(part)
        return finite

    def _take_shares(self, matrices: Sequence[TwoLevelGradient], step: Step):
        """Gives each its share of the rows of the host's mean, by messages."""
        places = range(self._host.share.parts)
        message = joined([gradient.send_to(place) for place in places for gradient in matrices])
        sizes = [sum(gradient.size_of(place) for gradient in matrices) for place in places]
        to = dict(zip(self._host.peers, sizes))
        received = yield self._workers.exchange(message, f"{self._name}.shares", step.parity, self._config, to)
        mean = self._sum(received).div_(len(places))
        mine = [gradient.size_of(self._host.share.place) for gradient in matrices]
        for gradient, part in zip(matrices, mean.split(mine)):
            gradient.take(part)

    def _read_shares(self, matrices: Sequence[TwoLevelGradient], step: Step):
        """The same, out of the gradients of the host's workers. They stay where they are until the averages of all
        workers are here."""
        assert self._peers is not None
        starts = torch.tensor([gradient.address for gradient in matrices])
        told = yield self._workers.tell(self._host.peers, starts, f"{self._name}.places", step.parity, self._config)
        place = self._host.share.place
        for gradient, addresses in zip(matrices, told.t().tolist()):
            own = gradient.send_to(place)
            self._peers.average(own, [start + own.data_ptr() - gradient.address for start in addresses])
            gradient.take(own)

    def _tell(self, own: torch.Tensor, step: Step) -> Gathered:
        """Starts giving all workers of the host what this one's rows have made of the factors."""
        return self._workers.tell(self._host.peers, own, f"{self._name}.own", step.parity, self._config)

    def _quantized_mean(self, flat: torch.Tensor, rows: Sequence[tuple[int, int]], name: str, step: Step):
        flat = self._sum((yield self._tell(flat, step)))
        return (yield from quantized_mean(flat, rows, name, Hosts(step, self._config, self._host)))

    @staticmethod
    def _sum(received: torch.Tensor) -> torch.Tensor:
        """Of what the workers of the host have sent, in their order."""
        first, second, *others = received.unbind(0)
        # Halves, which a factor may travel as, lose nothing more.
        total = first.float() + second if first.dtype == torch.float16 else first + second
        for part in others:
            total += part
        return total
