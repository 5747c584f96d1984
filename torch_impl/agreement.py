"""The workers' agreement: before optimizers exchange, all workers know that they run the same training, and which
optimizer of one worker is which of another's."""

import gc
import itertools
import weakref
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Protocol

from horovod.torch import mpi_ops

from horovod_powersgd.agreement import (
    MOST_WORKERS,
    Claim,
    Description,
    Settlement,
    Told,
    ballot,
    digest,
    settle,
)
from horovod_powersgd.torch.control_messages import items, largest
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.workers import Workers


class Party(Protocol):
    """An optimizer, as the agreement sees it.

    Attributes:
        workers: that it exchanges with. The agreement gives them the prefix of its messages' names.
        uncompressed: whether it exchanges by Horovod's own code.
        steps: that it has exchanged.
        generation: of the workers that it has agreed with.
    """

    workers: Workers
    uncompressed: bool
    steps: int
    generation: object

    def names(self) -> list[str]:
        """Of its parameters."""

    def description(self) -> Description:
        """What must be the same on every worker, in words."""

    def agreed(self, root: int | None, by_name: bool) -> None:
        """All workers have it. They all call this together.

        Args:
            root: the global rank of the worker with the most completed steps; None where all are new.
            by_name: whether the parameters have to be sorted by name.
        """


# Of each process set, in the order in which they were made.
_parties: dict[int, list["weakref.ref[Party]"]] = defaultdict(list)
# How many have agreed, since the workers last changed, of each process set and names.
_agreed: tuple[object, Counter] = (None, Counter())


def enter(party: Party) -> None:
    """Lets an optimizer be known."""
    _parties[party.workers.process_set.process_set_id].append(weakref.ref(party))


def leave(party: Party) -> None:
    """Forgets an optimizer, which exchanges no more."""
    known = _parties[party.workers.process_set.process_set_id]
    known[:] = [ref for ref in known if ref() not in (None, party)]


def parties(process_set_id: int | None = None) -> list[Party]:
    """The optimizers that there are, of one process set or of all."""
    refs = itertools.chain(*_parties.values()) if process_set_id is None else _parties[process_set_id]
    known = [ref() for ref in refs]
    return [party for party in known if party is not None]


def agree(party: Party) -> None:
    """Checks that all workers have this optimizer, or those that they ask for, and that they are configured alike.

    Costs one small allreduce; where workers come with different optimizers, or disagree, two gathers more.

    Raises:
        RuntimeError: on every worker, with what differs between whom.
    """
    # Not the party's own prefix: workers that disagree, or come with different ones, must meet.
    everyone = replace(party.workers, prefix="powersgd")
    known = parties(party.workers.process_set.process_set_id)
    names = digest(party.names())
    number = [other for other in known if digest(other.names()) == names].index(party)
    description = party.description()
    mine = ballot({**description, "number": str(number)})
    *highest, place = largest(everyone, [*mine, (party.steps + 1) * MOST_WORKERS - mpi_ops.rank()], "agreement")
    if highest == mine:
        root = None if place <= MOST_WORKERS else -place % MOST_WORKERS
        _agree_on(party, names, Settlement((), root, by_name=False))
        return
    gc.collect()  # what nobody holds is not to be counted
    known = parties(party.workers.process_set.process_set_id)
    told = [Told(digest(p.names()), p.description(), p.uncompressed, p.steps) for p in known]
    claims = items(everyone, Claim(mpi_ops.rank(), known.index(party), told), "claims")
    settlements = settle(claims)
    for settlement in settlements:
        one = known[settlement.places[everyone.index]]
        _agree_on(one, digest(one.names()), settlement)
    if not settlements:  # only Horovod's own code
        party.generation, party.workers.prefix = generation(), f"powersgd.{names}"


def _agree_on(party: Party, names: str, settlement: Settlement) -> None:
    global _agreed
    if _agreed[0] is not generation():
        _agreed = generation(), Counter()
    place = party.workers.process_set.process_set_id, names
    number, _agreed[1][place] = _agreed[1][place], _agreed[1][place] + 1
    party.workers.prefix = f"powersgd.{names}" + (f".{number}" if number else "")
    party.agreed(settlement.root, settlement.by_name)
