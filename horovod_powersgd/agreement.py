"""Whether all workers run the same training."""

import hashlib
import json
from typing import Dict, List, Mapping, Sequence

# What one worker must have in common with the others: what it is, in words, and its value, in words.
Description = Mapping[str, str]

DIGEST_BITS = 48

# The worker that has exchanged the most steps has the largest (steps + 1) * MOST_WORKERS - worker.
MOST_WORKERS = 2**20


def ballot(description: Description) -> List[int]:
    """Eight numbers, all positive and below 2^50. The workers' descriptions are equal where the largest of all
    workers' ballots, number by number, is each worker's own.

    A worker that has joined (hvd.join) sends zeros. That is why each number goes with its complement.
    """
    whole = hashlib.sha256(json.dumps(list(description.items())).encode()).digest()
    numbers = [1 + int.from_bytes(whole[i : i + DIGEST_BITS // 8], "big") for i in range(0, 24, 6)]
    return [*numbers, *(2 ** (DIGEST_BITS + 1) - number for number in numbers)]


def check_replicas(everyone: Sequence[Mapping], names: Mapping, what: str) -> None:
    """Checks that all workers' replicas are the same.

    Args:
        everyone: each worker's hash of each tensor, by key.
        names: of the tensors, by key, where that is not the name itself.
        what: the framework calls tensors.

    Raises:
        AssertionError: naming the tensors that differ, and from which worker on.
    """
    wrong: Dict[object, int] = {}
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
        holders: Dict[str, List[int]] = {}
        for worker, description in enumerate(descriptions):
            holders.setdefault(description.get(what, "missing"), []).append(worker)
        if len(holders) > 1:
            said = "; ".join(f"{_workers(workers)}: {value}" for value, workers in holders.items())
            lines.append(f"{what}: {said}")
    return "\n".join(lines or ["the order of the parameters"])


def _workers(workers: Sequence[int]) -> str:
    listed = ", ".join(map(str, workers[:8])) + (", ..." if len(workers) > 8 else "")
    return f"worker {listed}" if len(workers) == 1 else f"workers {listed}"
