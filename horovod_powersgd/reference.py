"""PowerSGD in plain numpy: the executable specification that every framework is held to.

`exchange` is one worker's side of one step. It is a generator: it yields each collective it needs and is resumed with
the result. `simulate` runs the generators of W workers in one process, `communicate` runs one worker's generator
over an mpi4py communicator; the algorithm is the same code in both.

Words: an n x m matrix has the factors P (n x r) and Q (m x r); `delta` is gradient plus memory; a half-step multiplies
delta with one factor's orthonormal basis to get the other factor.
"""

from dataclasses import dataclass, field
from typing import Dict, Generator, List, Mapping, Sequence

import numpy as np

from horovod_powersgd.layout import layout_of, leading_rows
from horovod_powersgd.powersgd import PowerSGD

# A factor's column counts as dependent on those before it when less than this many roundings of it are its own.
DEPENDENT = 128

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class AllreduceMean:
    """The request to average these tensors over all workers. It is answered with a dict of the same keys."""

    tensors: Tensors


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
        factors: the last averaged factor, by tensor name. The same on every worker.
    """

    steps: int = 0
    memory: Dict[str, np.ndarray] = field(default_factory=dict)
    factors: Dict[str, Factor] = field(default_factory=dict)


def initial_factor(name: str, columns: int, rank: int, seed: int, step: int = 0) -> np.ndarray:
    """The Q that every worker, in every framework, starts from.

    Args:
        name: of the tensor.
        columns: m of its n x m matrix.
        rank: r.
        seed: PowerSGD.seed.
        step: with warm_start=False, the number of the step (State.steps) that draws a fresh Q; otherwise 0.

    Returns:
        (columns, rank) float64, independent standard normal entries.
    """
    return np.random.default_rng([seed, step, *name.encode()]).standard_normal((columns, rank))


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


def exchange(
    gradients: Tensors, state: State, config: PowerSGD, matrix_shape=leading_rows
) -> Generator[AllreduceMean, Tensors, Dict[str, np.ndarray]]:
    """One worker's side of one step: paper, Algorithm 1, within Algorithm 2, lines 7 to 11.

    Args:
        gradients: this worker's, by name, float32 or float64, any shape. Not changed.
        state: this worker's; changed when the step is finite.
        config: the same on every worker.
        matrix_shape: how a tensor is seen as a matrix.

    Returns:
        The averaged updates by name, the same on every worker. A tensor whose average is not finite gets a
        non-finite update, and then the state stays what it was for all tensors.
    """
    deltas, plain, ranks = {}, {}, {}
    for name, gradient in gradients.items():
        layout = layout_of(gradient.shape, config, matrix_shape)
        if layout.compressed and state.steps >= config.warmup_steps:
            memory = state.memory.get(name, 0) if config.error_feedback else 0
            deltas[name] = gradient.reshape(layout.matrix_shape) + memory
            ranks[name] = layout.rank
        else:
            plain[name] = gradient

    factors = {name: _starting_factor(name, delta, ranks[name], state, config) for name, delta in deltas.items()}
    bases, own, failed = {}, {}, set()
    for half_step in range(config.num_iters_per_step):
        for name, factor in factors.items():
            spare = initial_factor(name, len(factor.array), ranks[name], config.seed)
            bases[name] = orthogonalize(factor.array, spare)                            # Q^ (or P^)
            side = deltas[name] if factor.is_q else deltas[name].T
            own[name] = _multiply(side, bases[name], config.wire_dtype)                 # delta_w Q^ (or delta_w^T P^)
        means = yield AllreduceMean({**own, **(plain if half_step == 0 else {})})
        for name, factor in factors.items():
            mean = means[name].astype(deltas[name].dtype)                               # P (or Q)
            if not np.isfinite(mean).all():     # on this worker as on all others: it goes on as zeros, to no effect
                failed.add(name)
                deltas[name], mean = np.zeros_like(deltas[name]), np.zeros_like(mean)
            factors[name] = Factor(mean, is_q=not factor.is_q)
        if half_step == 0:
            plain = {name: means[name] for name in plain}

    updates = dict(plain)
    for name in deltas:
        product = _product(bases[name], factors[name].array, factors[name].is_q)        # P^ Q^T
        updates[name] = (np.full_like(product, np.nan) if name in failed else product).reshape(gradients[name].shape)

    if not failed and all(np.isfinite(update).all() for update in plain.values()):
        state.steps += 1
        for name, delta in deltas.items():
            state.factors[name] = factors[name]
            if config.error_feedback:
                sent = own[name].astype(delta.dtype)
                state.memory[name] = delta - _product(bases[name], sent, factors[name].is_q)    # delta_w - P^ Q_w^T
    return {name: updates[name] for name in gradients}


def _starting_factor(name: str, delta: np.ndarray, rank: int, state: State, config: PowerSGD) -> Factor:
    """The last step's factor, or a random Q."""
    if config.warm_start and name in state.factors:
        return state.factors[name]
    step = 0 if config.warm_start else state.steps
    return Factor(initial_factor(name, delta.shape[1], rank, config.seed, step).astype(delta.dtype))


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
    gradients: Sequence[Tensors], states: Sequence[State], config: PowerSGD, matrix_shape=leading_rows
) -> List[Dict[str, np.ndarray]]:
    """One step of W workers in this process, in lockstep.

    Args:
        gradients: each worker's.
        states: each worker's, in the same order; changed.

    Returns:
        Each worker's updates; they are equal.
    """
    return lockstep([exchange(g, s, config, matrix_shape) for g, s in zip(gradients, states, strict=True)])


def communicate(comm, gradients: Tensors, state: State, config: PowerSGD, matrix_shape=leading_rows):
    """One step of this process's worker, with the other processes of an mpi4py communicator.

    Returns:
        The updates, the same on every worker, bit for bit those of `simulate` with the same gradients.
    """
    return over(comm, exchange(gradients, state, config, matrix_shape))


def lockstep(workers: Sequence[Generator]) -> list:
    """Runs the generators of all workers, answering each round's requests with their mean; returns their results."""
    requests = [next(worker) for worker in workers]
    while True:
        answer = _mean([request.tensors for request in requests])
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
            request = worker.send(_mean(comm.allgather(request.tensors)))
        except StopIteration as finished:
            return finished.value


def _mean(everyone: Sequence[Tensors]) -> Dict[str, np.ndarray]:
    """Each tensor's mean over the workers. Divided before it is summed, so that half precision does not overflow."""
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
    config: PowerSGD,
    learning_rate: float,
    momentum: float,
) -> Generator[AllreduceMean, Tensors, None]:
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
