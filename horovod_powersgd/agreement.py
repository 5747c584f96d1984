"""Whether all workers run the same training."""

import hashlib
import json
from typing import Dict, List, Mapping, Sequence

# What one worker must have in common with the others: what it is, in words, and its value, in words.
Description = Mapping[str, str]

DIGEST_BITS = 48


def digest(description: Description) -> List[int]:
    """Four numbers from 1 to 2^48 that two descriptions share only when they are equal."""
    encoded = json.dumps(list(description.items())).encode()
    whole = hashlib.sha256(encoded).digest()
    return [1 + int.from_bytes(whole[i : i + DIGEST_BITS // 8], "big") for i in range(0, 24, 6)]


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
