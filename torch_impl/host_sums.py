"""How the workers of a host come to the sums of what they have: by messages, or by reading each other's memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from horovod_powersgd.compressors.collectives import refusal_of_join
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.bucket import joined
from horovod_powersgd.torch.futures import Gathered
from horovod_powersgd.torch.peers import Peers
from horovod_powersgd.torch.step import Step
from horovod_powersgd.torch.two_level_gradient import TwoLevelGradient
from horovod_powersgd.torch.workers import Workers

# Before a gradient's name: what a worker's rows have made of its factor. No parameter's name has spaces.
OWN = "own part of "


@dataclass
class HostMessages:
    """Horovod's messages.

    Attributes:
        name: of the bucket whose gradients they are of.
        workers: that exchange it.
        config: how they compress.
        host: this worker's.
    """

    name: str
    workers: Workers
    config: Compressor
    host: Host

    def take_shares(self, matrices: Sequence[TwoLevelGradient], step: Step):
        """Gives each its share of the rows of the host's mean. Yields what it waits for."""
        places = range(self.host.share.parts)
        message = joined([gradient.send_to(place) for place in places for gradient in matrices])
        sizes = [sum(gradient.size_of(place) for gradient in matrices) for place in places]
        to = dict(zip(self.host.peers, sizes))
        received = yield self.workers.exchange(message, f"{self.name}.shares", step.parity, self.config, to)
        mean = _sum(received).div_(len(places))
        mine = [gradient.size_of(self.host.share.place) for gradient in matrices]
        for gradient, part in zip(matrices, mean.split(mine)):
            gradient.take(part, in_gradient=False)

    def tell_own(self, matrices: Sequence[TwoLevelGradient], step: Step) -> Gathered:
        """Starts telling the host's workers what this one's rows have made of the factors."""
        return self._tell(joined([gradient.own.reshape(-1) for gradient in matrices]), step)

    def take_own(self, matrices: Sequence[TwoLevelGradient], told: Gathered):
        """Gives each the host's part of its factor. Yields what it waits for."""
        sums = _sum((yield told))
        for gradient, part in zip(matrices, sums.split([gradient.factor_size for gradient in matrices])):
            gradient.take_own(part)

    def total(self, own: torch.Tensor, step: Step):
        """The sum of a flat tensor over the workers. Yields what it waits for."""
        return _sum((yield self._tell(own, step)))

    def _tell(self, own: torch.Tensor, step: Step) -> Gathered:
        return self.workers.tell(self.host.peers, own, f"{self.name}.own", step.parity, self.config)


@dataclass
class HostReadings(HostMessages):
    """Gradients are read where they are, where the workers can read each other's memory: what takes a message is only
    that they are there. They stay until their update is written, which takes averages that all readers have a part in.

    Attributes:
        peers: the host's workers.
    """

    peers: Peers

    def take_shares(self, matrices: Sequence[TwoLevelGradient], step: Step):
        for gradient in matrices:
            self.peers.show(gradient.name, gradient.whole)
        yield from self._meet("begins")
        shown, place = self.peers.shown(), self.host.share.place
        for gradient in matrices:
            own = gradient.send_to(place)
            self.peers.add_others(gradient.name, shown, own, gradient.offset_of(place))
            gradient.take(own.div_(self.host.share.parts), in_gradient=True)

    def tell_own(self, matrices: Sequence[TwoLevelGradient], step: Step) -> list[torch.Tensor]:  # type: ignore[override]
        # Copies, since the average takes the place of what is sent; of halves, in the precision of the sum.
        parts = [gradient.own.reshape(-1).to(gradient.dtype, copy=True) for gradient in matrices]
        for gradient, part in zip(matrices, parts):
            self.peers.show(OWN + gradient.name, part)
        return parts

    def take_own(self, matrices: Sequence[TwoLevelGradient], told: list[torch.Tensor]):  # type: ignore[override]
        shown = self.peers.shown()
        for gradient, part in zip(matrices, told):
            total = part.clone()
            self.peers.add_others(OWN + gradient.name, shown, total)
            gradient.take_own(total)
        yield from self._meet("ends")

    def _meet(self, when: str):
        """Waits until all workers are here."""
        present = yield self.workers.mean(torch.ones(1), f"{self.name}.{when}", in_place=True)
        if present.item() < 1 - 0.5 / self.workers.count:
            raise RuntimeError(refusal_of_join(self.config))


def _sum(received: torch.Tensor) -> torch.Tensor:
    """Of what the workers of the host have sent, in their order."""
    first, second, *others = received.unbind(0)
    # Halves, which a factor may travel as, lose nothing more.
    total = first.float() + second if first.dtype == torch.float16 else first + second
    for part in others:
        total += part
    return total
