"""What resuming needs beside model and optimizer: what compressors keep, and the memories."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from horovod_powersgd import checkpoint
from horovod_powersgd.arguments import required_compressor
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.tensorflow.training import LOADED, known_states, last_training, states_of
from horovod_powersgd.tensorflow.variable_state import VariableState


def compression_stats(variables: Sequence) -> CompressionStats:
    """What compression did to the gradients of these variables in the last step and in all steps of a training (the
    one that began last), on this worker.

    Raises:
        RuntimeError: they were not exchanged together yet.
    """
    exchanges = [e for state in known_states(variables) for e in state.counters.exchanges.values()]
    if not exchanges:
        raise RuntimeError("no gradients of these variables have been compressed yet")
    return exchanges[-1].stats()


def forget_compression(variables: Sequence) -> None:
    """Lets a new training of these variables begin as the first one did: all memories are empty, and what compressors
    keep, counters and statistics are what they were before the first step. Every worker calls it.

    An optimizer that is made for the new training needs no such call; tapes do, which all go on with one training.

    Args:
        variables: whose gradients are exchanged.

    Raises:
        RuntimeError: it is called inside a tf.function.
    """
    if not tf.executing_eagerly():
        raise RuntimeError("hvd.forget_compression belongs before a training, outside of any tf.function")
    states = known_states(variables)
    for holder in {id(holder): holder for state in states for holder in (state, state.counters)}.values():
        holder.begin_again()


def compression_state_dict(variables: Sequence) -> dict[str, object]:
    """What the compressor keeps, and this worker's memory: what a resumed run needs beside model and optimizer.

    Args:
        variables: whose gradients are exchanged together, in the order in which they are. Those of two tapes (a GAN's,
            say) are saved in two calls.

    Returns:
        Numbers, strings and numpy arrays, for pickle or numpy.save. Every worker saves its own.

    Raises:
        RuntimeError: none of them has been compressed yet.
        ValueError: they are not exchanged together.
    """
    found = last_training(variables)
    if found is None:
        raise RuntimeError("no gradients of these variables have been compressed yet")
    training, state = found
    return saved(states_of(variables, state.config, state.process_set, training))


def saved(states: Sequence[VariableState]) -> dict[str, object]:
    """compression_state_dict of these states."""
    config, process_set, counters = states[0].keeping.config, states[0].process_set, states[0].counters
    _check_together(states)
    tensors = {state.name: state.saved() for state in states}
    found = checkpoint.state_dict(config, process_set.size(), process_set.rank(), int(counters.steps), tensors)
    return found if counters.chosen is None else {**found, "auto": counters.chosen.state_dict()}


def _check_together(states: Sequence[VariableState]) -> None:
    parts: dict[int, str] = {}
    for state in states:
        parts.setdefault(id(state.counters), state.name)
    if len(parts) > 1:
        raise ValueError(
            f"these variables are exchanged in {len(parts)} parts, each of which counts its own steps: save and load "
            f"the state of each in a call of its own (they begin with {', '.join(parts.values())})"
        )


def load_compression_state_dict(
    states: Mapping | Iterable[Mapping],
    variables: Sequence,
    process_set: ProcessSet = global_process_set,
    compression=None,
) -> None:
    """Goes on where compression_state_dict was called.

    Args:
        states: what this worker saved; or what all workers saved, in the workers' order (a list, or a generator that
            loads one after the other). Another number of workers than then needs all of them: the memories are
            shared out so that their mean stays.
        variables: as then.
        process_set: of the workers.
        compression: that the gradients are going to be exchanged with. None: what they were exchanged with then;
            hvd.Auto and a generator function of one's own have to be given, unless they have exchanged them already.

    Raises:
        ValueError: another model or compressor, or states are missing, or the variables are not exchanged together. It
            names what differs.
    """

    def mine(first: Mapping) -> list[VariableState]:
        config = _known(first, variables) if compression is None else required_compressor(compression)
        return _begun_or_loaded(variables, config, process_set)

    load(states, mine)


def load(
    states: Mapping | Iterable[Mapping], mine_of: Callable[[Mapping], Sequence[VariableState]]
) -> None:
    """load_compression_state_dict into the states that `mine_of` finds for the first of what was saved."""
    alone = isinstance(states, Mapping)
    rest: Iterator[Mapping] = iter([states] if isinstance(states, Mapping) else states)
    first = next(rest, None)
    if first is None:
        raise ValueError("the compression states of all workers are needed, and none is given")
    mine = mine_of(first)
    _check_together(mine)
    shapes = [state.layout.shape for state in mine]

    def fits(saved: Mapping) -> bool:
        return [tuple(tensor["shape"]) for tensor in saved["tensors"].values()] == shapes

    def named_as_here(saved: Mapping) -> Mapping:
        # Workers can call a variable differently.
        tensors = zip((state.name for state in mine), saved["tensors"].values())
        return {**saved, "tensors": dict(tensors)} if fits(saved) else saved

    if fits(first):
        for state, name in zip(mine, first["tensors"]):
            state.rename(name)
    chosen = mine[0].counters.chosen
    if chosen is not None:
        chosen.take(first["config"])
    share = checkpoint.share_of(
        first if alone else map(named_as_here, itertools.chain([first], rest)),
        mine[0].current.config,
        dict(zip((state.name for state in mine), shapes)),
        mine[0].process_set.size(),
        mine[0].process_set.rank(),
    )
    mine[0].counters.steps.assign(share.steps)
    for state in mine:
        state.load_state_dict(share.tensors[state.name], share.memories.get(state.name, ()), share.weight)
    if chosen is not None:
        chosen.load_state_dict(first)


def _begun_or_loaded(variables: Sequence, config: Compressor, process_set: ProcessSet) -> list[VariableState]:
    """The states of the training that began last; where none has begun, of the one that will."""
    training, _ = last_training(variables, config, process_set) or (LOADED, None)
    return states_of(variables, config, process_set, training)


def _known(saved: Mapping, variables: Sequence) -> Compressor:
    """The compressor of a saved state: one that these variables are exchanged with, or a new one."""
    for state in known_states(variables):
        known = state.config, *getattr(state.config, "candidates", ())
        if saved["config"] in [config.description() for config in known]:
            return state.config
    if "auto" in saved:
        raise ValueError("the compression state was saved with hvd.Auto: give it as compression=")
    return checkpoint.compressor_from(saved["config"])


class CompressionState(tf.Module):
    """What a compressor keeps, and the memory, of variables, for tf.train.Checkpoint. Every worker saves its own.

    It is of the training of these variables that began last, or, before any exchange, of the one that begins next.

    Args:
        variables: whose gradients are exchanged together, in the order in which they are.
        compression: the compressor, or the generator function, that they are exchanged with.
        process_set: of the workers.

    Example:
        >>> checkpoint = tf.train.Checkpoint(
        ...     model=model,
        ...     optimizer=optimizer,
        ...     compression=hvd.CompressionState(model.trainable_variables, hvd.PowerSGD(rank=4)),
        ... )
        >>> checkpoint.save(f"checkpoints/worker-{hvd.rank()}")
    """

    def __init__(
        self,
        variables: Sequence,
        compression: Compressor | Callable,
        process_set: ProcessSet = global_process_set,
    ):
        super().__init__()
        states = _begun_or_loaded(variables, required_compressor(compression), process_set)
        _check_together(states)
        self.steps = states[0].counters.steps
        self.chosen = {} if states[0].counters.chosen is None else states[0].counters.chosen.variables()
        self.tensors = {}
        for state in states:
            own = {name: getattr(state, name) for name in ("memory", "memory_unit", "memory_share")}
            own = {name: variable for name, variable in own.items() if variable is not None}
            self.tensors[state.name] = {**own, **state.shared()}
