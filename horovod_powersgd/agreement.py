"""Whether all workers run the same training."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# What one worker must have in common with the others: what it is, in words, and its value, in words.
Description = Mapping[str, str]

DIGEST_BITS = 48

# The worker that has exchanged the most steps has the largest (steps + 1) * MOST_WORKERS - worker.
MOST_WORKERS = 2**20


def configuration(
    compression: str, sum_gradients: bool, predivide_factor: float, groups: object, sparse_as_dense: bool
) -> dict[str, str]:
    """What of a distributed optimizer's or a tape's arguments must be the same on every worker, in words.

    Args:
        compression: its repr.
        sum_gradients: whether op is Sum; else it is Average.
        predivide_factor: gradient_predivide_factor.
        groups: Horovod's, with names or numbers in the place of parameters.
        sparse_as_dense: as given.
    """
    return {
        "compression": compression,
        "op": "Sum" if sum_gradients else "Average",
        "gradient_predivide_factor": repr(predivide_factor),
        "groups": repr(groups),
        "sparse_as_dense": repr(sparse_as_dense),
    }


def ballot(description: Description) -> list[int]:
    """Eight numbers, all positive and below 2^50. The workers' descriptions are equal where the largest of all
    workers' ballots, number by number, is each worker's own.

    A worker that has joined (hvd.join) sends zeros. That is why each number goes with its complement.
    """
    whole = hashlib.sha256(json.dumps(list(description.items())).encode()).digest()
    numbers = [1 + int.from_bytes(whole[i : i + DIGEST_BITS // 8], "big") for i in range(0, 24, 6)]
    return [*numbers, *(2 ** (DIGEST_BITS + 1) - number for number in numbers)]


def digest(names: Iterable[str]) -> str:
    """What tells sets of names apart, in a few letters; their order does not count."""
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:12]


class Told(NamedTuple):
    """What a worker tells of one of its optimizers.

    Attributes:
        names: the digest of its parameters' names.
        description: what must be the same on all workers. Its order counts less: see Settlement.
        uncompressed: whether it exchanges by Horovod's own code, which wants nothing to be the same.
        steps: that it has exchanged.
    """

    names: str
    description: Description
    uncompressed: bool
    steps: int


class Claim(NamedTuple):
    """What one worker says when optimizers are to be told apart: which of its own is about to exchange.

    Attributes:
        worker: its global rank.
        asked: the place of that optimizer among
        told: all optimizers of this worker, in the order in which they were made.
    """

    worker: int
    asked: int
    told: Sequence[Told]


class Settlement(NamedTuple):
    """One optimizer that all workers have.

    Attributes:
        places: for each worker, where among its own it is.
        root: the global rank of the worker that has exchanged the most steps with it; None where none has any.
        by_name: whether the workers have its parameters in different orders, so that they have to be sorted.
    """

    places: Sequence[int]
    root: int | None
    by_name: bool


def settle(claims: Sequence[Claim]) -> list[Settlement]:
    """Which optimizer of one worker is which of another's, where workers come with different ones.

    Two workers may step two optimizers in different orders; one may have made one more, which it never steps.

    Args:
        claims: of all workers, in their order; the same on all of them.

    Returns:
        One for each optimizer that a worker has asked for; none where all of these exchange by Horovod's own code.

    Raises:
        RuntimeError: the workers do not agree, with what differs between whom.
    """
    asked = [claim.told[claim.asked] for claim in claims]
    if all(told.uncompressed for told in asked):
        return []
    settlements = []
    places = {
        names: [[i for i, told in enumerate(claim.told) if told.names == names] for claim in claims]
        for names in sorted({told.names for told in asked})
    }
    if not all(some for candidates in places.values() for some in candidates):
        raise disagreement([told.description for told in asked])
    for candidates in places.values():
        if len({len(some) for some in candidates}) == 1:
            # Made in the same order; asked for in any.
            numbers: set[int] = {
                some.index(claim.asked) for claim, some in zip(claims, candidates) if claim.asked in some
            }
            rows = [[some[number] for some in candidates] for number in sorted(numbers)]
        else:
            rows = [[_only(claim, some) for claim, some in zip(claims, candidates)]]
        settlements += [_settlement(claims, row) for row in rows]
    return settlements


def _only(claim: Claim, candidates: Sequence[int]) -> int:
    """The one of a worker's optimizers that is meant, where workers have different numbers of them."""
    if claim.asked in candidates:
        return claim.asked
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(what for what in claim.told[candidates[0]].description if what.startswith("parameter"))
    raise RuntimeError(
        f"Worker {claim.worker} has {len(candidates)} distributed optimizers of parameters with the same names, and "
        f"other workers have another number of them, so that they cannot be told apart: give DistributedOptimizer "
        f"named_parameters of which each optimizer's are called differently ({names[:200]})"
    )


def _settlement(claims: Sequence[Claim], places: Sequence[int]) -> Settlement:
    told = [claim.told[place] for claim, place in zip(claims, places)]
    if any(dict(t.description) != dict(told[0].description) for t in told):
        raise disagreement([t.description for t in told])
    steps, root = max((t.steps, -claim.worker) for claim, t in zip(claims, told))
    orders = {tuple(t.description) for t in told}
    return Settlement(places, -root if steps else None, len(orders) > 1)


def disagreement(descriptions: Sequence[Description]) -> RuntimeError:
    """The error on every worker, from all workers' descriptions in their order."""
    return RuntimeError(f"The workers do not agree:\n{differences(descriptions)}")


def check_replicas(everyone: Sequence[Mapping], names: Mapping, what: str) -> None:
    """Checks that all workers' replicas are the same.

    Args:
        everyone: each worker's hash of each tensor, by key.
        names: of the tensors, by key, where that is not the name itself.
        what: the framework calls tensors.

    Raises:
        AssertionError: naming the tensors that differ, and from which worker on.
    """
    wrong: dict[object, int] = {}
    for worker, theirs in enumerate(everyone):
        for key in {**everyone[0], **theirs}:
            if theirs.get(key) != everyone[0].get(key):
                wrong.setdefault(key, worker)
    if wrong:
        shown = list(wrong.items())[:10]
        listed = "; ".join(f"{names.get(key, key)} (worker {worker} and worker 0)" for key, worker in shown)
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise AssertionError(f"The workers' replicas differ in {len(wrong)} {what}: {listed}{more}")


def differences(descriptions: Sequence[Description]) -> str:
    """What differs between whom, a line for each difference.

    Args:
        descriptions: one for each worker, in their order.
    """
    lines = []
    for what in dict.fromkeys(what for description in descriptions for what in description):
        holders: dict[str, list[int]] = {}
        for worker, description in enumerate(descriptions):
            holders.setdefault(description.get(what, "missing"), []).append(worker)
        if len(holders) > 1:
            said = "; ".join(f"{_workers(workers)}: {value}" for value, workers in holders.items())
            lines.append(f"{what}: {said}")
    return "\n".join(lines or ["the order of the parameters"])


def _workers(workers: Sequence[int]) -> str:
    listed = ", ".join(map(str, workers[:8])) + (", ..." if len(workers) > 8 else "")
    return f"worker {listed}" if len(workers) == 1 else f"workers {listed}"
