"""All compressors in plain numpy: the executable specification that every framework is held to.

`exchange` is one worker's side of one step. It is a generator: it yields each collective it needs and is resumed with
the result. `simulate` runs the generators of W workers in one process, `communicate` runs one worker's generator
over an mpi4py communicator; the algorithm is the same code in both. PowerSGD is here; the other compressors are written
once for all frameworks, in files of their own.

Words: an n x m matrix has the factors P (n x r) and Q (m x r); `delta` is gradient plus memory; a half-step multiplies
delta with one factor's orthonormal basis to get the other factor.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Generator, List, Mapping, Optional, Sequence, Union

import numpy as np

from horovod_powersgd import arrays
from horovod_powersgd.compressors.accordion import Accordion, Regime
from horovod_powersgd.compressors.compressor import Allgather, AllreduceMean, Compressor, compressor_of
from horovod_powersgd.layout import Layout, layout_of, leading_rows
from horovod_powersgd.compressors.powersgd import PowerSGD
from horovod_powersgd.randomness import SPARE, key_of, random_factor
from horovod_powersgd.compressors.matrix_state import MatrixState

# A factor's column counts as dependent on those before it when less than this many roundings of it are its own.
DEPENDENT = 128

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Factor:
    """A factor that was averaged: Q (m x r) if `is_q`, else P (n x r)."""

    array: np.ndarray
    is_q: bool = True


@dataclass
class State:
    """What one worker keeps from step to step. A step that fails or is not finite leaves it as it was.

    Attributes:
        steps: that were exchanged with finite results.
        memory: error-feedback memory, by tensor name, (rows, columns). This worker's own.
        factors: PowerSGD's last averaged factor, by tensor name. The same on every worker.
        kept: what other compressors keep, by tensor name. The same on every worker.
        regimes: Accordion's, by tensor name. The same on every worker.
    """

    steps: int = 0
    memory: Dict[str, np.ndarray] = field(default_factory=dict)
    factors: Dict[str, Factor] = field(default_factory=dict)
    kept: Dict[str, Dict[str, np.ndarray]] = field(default_factory=dict)
    regimes: Dict[str, Regime] = field(default_factory=dict)


def initial_factor(name: str, columns: int, rank: int, seed: int) -> np.ndarray:
    """The Q that every worker, in every framework, starts from. What is drawn later is from random_factor.

    Args:
        name: of the tensor. Only what comes after the last dot or slash counts: the rest changes with what a model is
            put into (module., _orig_mod.) and with how many layers Keras has counted.
        columns: m of its n x m matrix.
        rank: r.
        seed: PowerSGD.seed.

    Returns:
        (columns, rank) float64, independent standard normal entries.
    """
    last = re.split("[./]", name)[-1]
    return np.random.default_rng([seed, 0, *last.encode()]).standard_normal((columns, rank))


def orthogonalize(matrix: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the matrix's columns, by Gram-Schmidt in double precision.

    A column that depends on those before it, up to rounding, gives its place to the spare column, so that a factor
    of zeros or of low rank still makes a whole basis.

    Args:
        matrix: (n, r), r <= n, finite.
        spare: (n, r) random.

    Returns:
        (n, r) of the matrix's dtype.
    """
    columns = matrix.astype(np.float64)
    columns /= np.abs(columns).max() or 1.0
    smallest = DEPENDENT * np.finfo(matrix.dtype).eps * np.linalg.norm(columns, axis=0).max()
    basis = np.empty(matrix.shape)
    for i in range(matrix.shape[1]):
        column = _reject(columns[:, i], basis[:, :i])
        if np.linalg.norm(column) <= smallest:
            column = _reject(spare[:, i], basis[:, :i])
        basis[:, i] = column / np.linalg.norm(column)
    return basis.astype(matrix.dtype)


def _reject(column: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The part of the column that is orthogonal to the basis; twice, because once loses digits."""
    for _ in range(2):
        column = column - basis @ (basis.T @ column)
    return column


def resized(factor: np.ndarray, rank: int, fresh: np.ndarray) -> np.ndarray:
    """A factor of another rank, for Accordion.

    Args:
        factor: (n, R).
        rank: r. Where it is smaller, the r directions stay in which the factor is largest, which are those of delta;
            where it is larger, fresh columns are added.
        fresh: (n, r) random; its last columns are added, as long as the factor's on average.

    Returns:
        (n, r) of the factor's dtype.
    """
    columns = factor.shape[1]
    if rank < columns:
        wide = factor.astype(np.float64)
        return (wide @ np.linalg.eigh(wide.T @ wide)[1][:, columns - rank :]).astype(factor.dtype)
    added = fresh[:, columns:]
    length = np.linalg.norm(factor.astype(np.float64)) / np.sqrt(columns)
    if length > 0:
        added = added * (length / np.linalg.norm(added, axis=0))
    return np.concatenate([factor, added.astype(factor.dtype)], axis=1)


def powersgd(delta: np.ndarray, state: MatrixState, config: PowerSGD) -> Generator:
    """One worker's side of the exchange of one matrix: paper, Algorithm 1, within Algorithm 2, lines 8 to 11.

    Args:
        delta: (n, m), finite.
        state: keeps the last factor.
        config: the same on every worker.

    Yields:
        AllreduceMean, once for each half-step.

    Returns:
        (P^ Q^T, P^ Q_w^T): the update, and this worker's part of it.
    """
    renews = config.renews(state.step)
    factor = state.get("factor", None)
    if renews or not config.warm_start:
        drawn = random_factor(arrays, state.key, state.step, delta.shape[1], state.amount)
        factor = Factor(drawn.astype(delta.dtype))
    elif factor is None:
        factor = Factor(initial_factor(state.name, delta.shape[1], state.amount, config.seed).astype(delta.dtype))
    for _ in range(config.half_steps(renews)):
        fresh = _spare(state.key, len(factor.array), state.amount)
        if factor.array.shape[1] != state.amount:
            factor = Factor(resized(factor.array, state.amount, fresh), factor.is_q)
        basis = orthogonalize(factor.array, fresh)                                      # Q^ (or P^)
        side = delta if factor.is_q else delta.T
        own = _multiply(side, basis, config.wire_dtype)                                 # delta_w Q^ (or delta_w^T P^)
        mean = yield AllreduceMean(own)                                                 # P (or Q)
        factor = Factor(mean.astype(delta.dtype), is_q=not factor.is_q)
    state.put("factor", factor)
    return (
        _product(basis, factor.array, factor.is_q),                                     # P^ Q^T
        _product(basis, own.astype(delta.dtype), factor.is_q),                          # P^ Q_w^T
    )


@functools.lru_cache(256)
def _spare(key: int, length: int, rank: int) -> np.ndarray:
    """The columns that take the place of others, or are added to them: kept, since they are the same in every step."""
    return random_factor(arrays, key, SPARE, length, rank)


def exchange(
    gradients: Tensors,
    state: State,
    config: Compressor,
    matrix_shape=leading_rows,
    worker: int = 0,
    workers: int = 1,
    learning_rate: Optional[float] = None,
) -> Generator[Union[AllreduceMean, Allgather], Mapping, Dict[str, np.ndarray]]:
    """One worker's side of one step.

    Args:
        gradients: this worker's, by name, float32 or float64, any shape. Not changed.
        state: this worker's; changed when the step is finite.
        config: a compressor, or a generator function; the same on every worker.
        matrix_shape: how a tensor is seen as a matrix.
        worker: this one's number.
        workers: how many there are.
        learning_rate: of this step, for Accordion.

    Returns:
        The averaged updates by name, the same on every worker. A tensor whose average is not finite gets a
        non-finite update, and then the state stays what it was for all tensors.
    """
    config = compressor_of(config)
    plain, matrices = {}, {}
    for name, gradient in gradients.items():
        layout = layout_of(gradient.shape, config, matrix_shape)
        if layout.compressed and state.steps >= config.warmup_steps:
            matrices[name] = _Matrix(name, gradient, layout, state, config, worker, workers, learning_rate)
        else:
            plain[name] = gradient

    waiting = list(plain)
    while waiting or any(matrix.request is not None for matrix in matrices.values()):
        asking = {name: matrix for name, matrix in matrices.items() if matrix.request is not None}
        means = {name: m.parts()[0] for name, m in asking.items() if isinstance(m.request, AllreduceMean)}
        gathers = {name: m.parts() for name, m in asking.items() if isinstance(m.request, Allgather)}
        answers = {}
        if means or waiting:
            answers.update((yield AllreduceMean({**means, **{name: plain[name] for name in waiting}})))
        if gathers:
            answers.update((yield Allgather(gathers)))
        plain.update((name, answers[name]) for name in waiting)
        waiting = []
        for name, matrix in asking.items():
            matrix.go_on(answers[name])

    updates = {**plain, **{name: matrix.update for name, matrix in matrices.items()}}
    if all(np.isfinite(update).all() for update in updates.values()):
        state.steps += 1
        for matrix in matrices.values():
            matrix.keep(state)
    return {name: updates[name].reshape(gradient.shape) for name, gradient in gradients.items()}


class _Matrix:
    """One matrix in one step: delta, and the generator that exchanges it.

    Attributes:
        request: what the generator asks for; None at its end.
        update: what it returned; not a number where an answer was not finite.
    """

    def __init__(self, name, gradient, layout: Layout, state: State, config: Compressor, worker, workers, rate):
        self.name, self._config, self._failed, amount = name, config, False, layout.amount
        if isinstance(config, Accordion):
            self._regime = state.regimes.get(name, Regime()).decided(config, state.steps, rate, _norm)
            amount = config.amount_now(*layout.matrix_shape, self._regime.is_low)
        self._delta = gradient.reshape(layout.matrix_shape)
        if config.keeps_memory:
            self._delta = self._delta + state.memory.get(name, 0)
        self._finite = bool(np.isfinite(self._delta).all())
        if not self._finite:
            self._delta = np.zeros_like(self._delta)
        kept = dict(state.kept.get(name, {}), factor=state.factors.get(name))
        self._state = MatrixState(arrays, name, layout.matrix_shape, key_of(name, config.seed), kept)
        self._state.begin(state.steps, amount, worker, workers, self._finite)
        family = config.family
        if isinstance(family, PowerSGD):
            self._generator = powersgd(self._delta, self._state, family)
        else:
            self._generator = family.exchange(self._delta, self._state)
        self._resume(None)

    def parts(self) -> List[np.ndarray]:
        """What it asks for, to be sent: no floats are numbers where this worker's delta was not finite."""
        request = self.request
        tensors = [request.tensors] if isinstance(request, AllreduceMean) else list(request.tensors)
        if not self._finite:
            tensors = [np.full_like(t, np.nan) if t.dtype.kind == "f" else t for t in tensors]
        return tensors

    def go_on(self, answer) -> None:
        """Takes the answer. What is not finite goes on as zeros, on this worker as on all others, to no effect."""
        answers = [answer] if isinstance(answer, np.ndarray) else list(answer)
        if not all(np.isfinite(part).all() for part in answers):
            self._failed = True
            answers = [np.zeros_like(part) for part in answers]
        self._resume(answers[0] if isinstance(answer, np.ndarray) else answers)

    def _resume(self, answer) -> None:
        try:
            self.request = self._generator.send(answer)
        except StopIteration as finished:
            self.request = None
            update, self._sent = finished.value
            self.update = np.full_like(update, np.nan) if self._failed else update

    def keep(self, state: State) -> None:
        """Keeps what the next step needs."""
        kept = dict(self._state.kept)
        factor = kept.pop("factor")
        if factor is not None:
            state.factors[self.name] = factor
        if kept:
            state.kept[self.name] = kept
        if self._config.keeps_memory:
            state.memory[self.name] = self._delta - self._sent.reshape(self._delta.shape)     # delta_w - P^ Q_w^T
        if isinstance(self._config, Accordion):
            update = self.update.reshape(self._delta.shape)
            self._regime.total = update if self._regime.total is None else self._regime.total + update
            state.regimes[self.name] = self._regime


def _norm(matrix: np.ndarray) -> float:
    return np.linalg.norm(matrix.astype(np.float64))


def _multiply(side: np.ndarray, basis: np.ndarray, wire_dtype) -> np.ndarray:
    """The other factor in the precision that it travels in; what overflows becomes infinite and fails the step."""
    with np.errstate(invalid="ignore", over="ignore"):
        factor = side @ basis
        # By way of float32, as processors do it.
        return factor if wire_dtype is None else factor.astype(np.float32).astype(wire_dtype)


def _product(basis: np.ndarray, factor: np.ndarray, factor_is_q: bool) -> np.ndarray:
    """P^ Q^T, or P Q^^T where the last half-step made P."""
    return basis @ factor.T if factor_is_q else factor @ basis.T


def simulate(
    gradients: Sequence[Tensors],
    states: Sequence[State],
    config: Compressor,
    matrix_shape=leading_rows,
    learning_rate: Optional[float] = None,
) -> List[Dict[str, np.ndarray]]:
    """One step of W workers in this process, in lockstep.

    Args:
        gradients: each worker's.
        states: each worker's, in the same order; changed.
        (the others): as exchange's.

    Returns:
        Each worker's updates; they are equal.
    """
    return lockstep(
        [
            exchange(g, s, config, matrix_shape, worker, len(states), learning_rate)
            for worker, (g, s) in enumerate(zip(gradients, states, strict=True))
        ]
    )


def communicate(
    comm, gradients: Tensors, state: State, config: Compressor, matrix_shape=leading_rows, learning_rate=None
):
    """One step of this process's worker, with the other processes of an mpi4py communicator.

    Returns:
        The updates, the same on every worker, bit for bit those of `simulate` with the same gradients.
    """
    return over(comm, exchange(gradients, state, config, matrix_shape, comm.rank, comm.size, learning_rate))


def lockstep(workers: Sequence[Generator]) -> list:
    """Runs the generators of all workers, answering each round's requests; returns their results."""
    requests = [next(worker) for worker in workers]
    while True:
        answer = _answer(requests)
        results, requests = [], []
        for worker in workers:
            try:
                requests.append(worker.send(answer))
            except StopIteration as finished:
                results.append(finished.value)
        if results:
            return results


def over(comm, worker: Generator):
    """Runs one worker's generator over an mpi4py communicator; returns its result."""
    request = next(worker)
    while True:
        try:
            request = worker.send(_answer(comm.allgather(request)))
        except StopIteration as finished:
            return finished.value


def _answer(requests: Sequence[Union[AllreduceMean, Allgather]]) -> Dict[str, Any]:
    """What each of the workers gets that ask for this."""
    everyone = [request.tensors for request in requests]
    if isinstance(requests[0], Allgather):
        return {name: [np.stack(parts) for parts in zip(*(t[name] for t in everyone))] for name in everyone[0]}
    # Divided before it is summed, so that half precision does not overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            name: sum(tensors[name] / tensors[name].dtype.type(len(everyone)) for tensors in everyone)
            for name in everyone[0]
        }


@dataclass
class OptimizerState:
    """Algorithm 2's state of one worker: what the exchange keeps, and the momentum by tensor name."""

    exchange: State = field(default_factory=State)
    momentum: Dict[str, np.ndarray] = field(default_factory=dict)


def algorithm_2(
    parameters: Dict[str, np.ndarray],
    gradients: Tensors,
    state: OptimizerState,
    config: Compressor,
    learning_rate: float,
    momentum: float,
) -> Generator[Union[AllreduceMean, Allgather], Mapping, None]:
    """One worker's whole step of the paper's Algorithm 2, to be run by `lockstep` or `over`.

    Error feedback comes before the exchange, momentum after it. The parameters and the state are changed, unless
    the step is not finite.
    """
    steps = state.exchange.steps
    updates = yield from exchange(gradients, state.exchange, config)                    # lines 7 to 11: Delta'
    if state.exchange.steps == steps:
        return
    for name, update in updates.items():
        state.momentum[name] = momentum * state.momentum.get(name, 0) + update          # line 12: m
        parameters[name] = parameters[name] - learning_rate * (update + state.momentum[name])   # line 13: x
