"""What a worker saves of its exchange, and who loads what when the workers have changed."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import horovod_powersgd
from horovod_powersgd.compressors.compressor import Compressor

STATE_VERSION = 2

# One tensor's saved shape, memory, and what else is kept of it.
SavedTensor = Mapping[str, Any]


def state_dict(config: Compressor, workers: int, worker: int, steps: int, tensors: Mapping[str, SavedTensor]) -> dict:
    """One worker's state: numbers, strings and the framework's arrays."""
    return {
        "version": STATE_VERSION,
        "config": config.description(),
        "workers": workers,
        "worker": worker,
        "steps": steps,
        "tensors": tensors,
    }


class Share(NamedTuple):
    """What one worker takes from saved states.

    Attributes:
        steps: that were exchanged.
        tensors: a state of each tensor, by name; its factor is the same in all workers' states.
        memories: the states of each tensor whose memories are this worker's, by name.
        weight: what the sum of those memories is multiplied by, so that the mean over the workers stays.
    """

    steps: int
    tensors: Mapping[str, SavedTensor]
    memories: Mapping[str, list[SavedTensor]]
    weight: float


def share_of(
    states: Mapping | Iterable[Mapping],
    config: Compressor,
    shapes: Mapping[str, tuple[int, ...]],
    workers: int,
    worker: int,
) -> Share:
    """This worker's part of saved states.

    Args:
        states: this worker's state, or those of all workers in their order. With another number of workers than
            the state is from, all are needed.
        config: of this exchange.
        shapes: of this exchange's tensors, by name.
        workers: how many there are.
        worker: this one's number.

    Raises:
        ValueError: the state is of another model or configuration, or does not serve this number of workers.
    """
    alone = isinstance(states, Mapping)
    memories: dict[str, list[SavedTensor]] = {}
    seen, saved, steps, tensors = [], 0, 0, {}
    for state in [states] if isinstance(states, Mapping) else states:
        _check(state, config, shapes)
        seen.append(state["worker"])
        if seen[0] != seen[-1] and (saved, steps) != (state["workers"], state["steps"]):
            raise ValueError(f"the compression states of workers {seen[0]} and {seen[-1]} are not of the same step")
        saved, steps, tensors = state["workers"], state["steps"], state["tensors"]
        if alone and (saved, seen) != (workers, [worker]):
            raise ValueError(
                f"the compression state of worker {seen[0]} of {saved} alone does not serve worker {worker} of "
                f"{workers}: load that worker's own, or the list of all workers' states"
            )
        if seen[-1] % workers == worker:
            for name, tensor in tensors.items():
                if tensor.get("memory") is not None:
                    memories.setdefault(name, []).append(tensor)
    if not alone and (not seen or sorted(seen) != list(range(saved))):
        raise ValueError(f"the compression states of all workers are needed, and those given are of {seen}")
    return Share(steps, tensors, memories, workers / saved)


def _check(state: Mapping, config: Compressor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"not a compression state of version {STATE_VERSION}: {state.get('version')!r}")
    mine = _words(config.description())
    mine.update((name, f"shape {tuple(shape)}") for name, shape in shapes.items())
    theirs = _words(state["config"])
    theirs.update((name, f"shape {tuple(tensor['shape'])}") for name, tensor in state["tensors"].items())
    wrong = [what for what in {**mine, **theirs} if mine.get(what) != theirs.get(what)]
    if wrong:
        listed = "; ".join(
            f"{what}: {theirs.get(what, 'missing')} in the state, {mine.get(what, 'missing')} here" for what in wrong
        )
        raise ValueError(f"the compression state is of another model or configuration: {listed}")


def _words(description: Mapping) -> dict[str, str]:
    """Each field of a compressor, in words."""
    words: dict[str, str] = {}
    for field, value in description.items():
        if field in ("hierarchical", "memory_dtype"):  # what is saved of the memories serves the one as the other
            continue
        inner = _words(value) if isinstance(value, Mapping) else {"": repr(value)}
        words.update((f"{description['compressor']}.{field}{what and '.'}{what}", v) for what, v in inner.items())
    return words


def compressor_from(description: Mapping) -> Compressor:
    """The compressor of a Compressor.description().

    Raises:
        ValueError: it is a function, which no description holds.
    """
    fields: dict[str, Any] = {k: compressor_from(v) if isinstance(v, Mapping) else v for k, v in description.items()}
    name = fields.pop("compressor")
    if name == "Custom":
        raise ValueError(
            f"the compression state was made with the function {fields['function']}: let gradients be exchanged with "
            "it once before the state is loaded"
        )
    return getattr(horovod_powersgd, name)(**fields)
