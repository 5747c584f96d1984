"""Who averages in 8 bits: each worker for itself, or a host for all its workers."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.hosts import Host
from horovod_powersgd.torch.step import Step


@dataclass(frozen=True)
class Senders:
    """The workers, each of which has messages of its own.

    Attributes:
        step: that the messages belong to.
        compressor: that asks for them.
    """

    step: Step
    compressor: Compressor

    @property
    def count(self) -> int:
        """How many there are."""
        return self.step.workers.count

    @property
    def index(self) -> int:
        """This one's number among them."""
        return self.step.workers.index

    def gather(self, message: torch.Tensor, name: str) -> Generator[Any, Any, torch.Tensor]:
        """What all send to all, (count, bytes), where this one sends a message (bytes,). Yields what it waits for."""
        step = self.step
        step.count(message.nbytes, message.nbytes * step.workers.count)
        return (yield step.workers.gather(message, f"{name}.gather", step.parity, self.compressor))

    def exchange(self, messages: torch.Tensor, name: str) -> Generator[Any, Any, torch.Tensor]:
        """What all send to this one, (count, bytes), where this one sends each a message (count, bytes). Yields what it
        waits for."""
        step = self.step
        step.count(messages.nbytes, messages.nbytes)
        return (yield step.workers.exchange(messages, f"{name}.alltoall", step.parity, self.compressor))


@dataclass(frozen=True)
class Hosts(Senders):
    """The hosts. All workers of one have its messages; each sends a part of every message to its likes on the other
    hosts, who tell theirs: so a message comes to each host once.

    Attributes:
        host: this worker's.
    """

    host: Host

    @property
    def count(self) -> int:
        return len(self.host.hosts)

    @property
    def index(self) -> int:
        return self.host.number

    def gather(self, message: torch.Tensor, name: str) -> Generator[Any, Any, torch.Tensor]:
        return (yield from self.exchange(message.repeat(self.count, 1), name))

    def exchange(self, messages: torch.Tensor, name: str) -> Generator[Any, Any, torch.Tensor]:
        step, mine = self.step, self._my_part(messages)
        step.count(mine.nbytes, mine.nbytes)
        # Messages come and go in the order of the workers' numbers, which need not be that of their hosts.
        numbers = [peers[self.host.share.place] for peers in self.host.hosts]
        places = torch.tensor(numbers).argsort()
        whom, how = dict.fromkeys(numbers, 1), (step.parity, self.compressor)
        mine[places] = yield step.workers.exchange(mine[places], f"{name}.alltoall", *how, whom)
        parts = yield step.workers.tell(self.host.peers, mine.view(-1), f"{name}.parts", *how)
        whole = parts.view(len(parts), *mine.shape).transpose(0, 1).reshape(len(mine), -1)
        return whole[:, : messages.shape[1]]

    def _my_part(self, messages: torch.Tensor) -> torch.Tensor:
        """Of messages (count, bytes), (count, part of the bytes), a copy; zeros make all parts equally long."""
        (place, parts), length = self.host.share, messages.shape[1]
        size = -(-length // parts)
        padded = torch.nn.functional.pad(messages, (0, parts * size - length))
        return padded.narrow(1, place * size, size).clone(memory_format=torch.contiguous_format)
