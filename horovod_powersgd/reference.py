"""All compressors in plain numpy: the executable specification that every framework is held to.

`exchange` is one worker's side of one step. It is a generator: it yields each collective it needs and is resumed with
the result. `simulate` runs the generators of W workers in one process, `communicate` runs one worker's generator
over an mpi4py communicator; the algorithm is the same code in both. What becomes of one matrix is each compressor's own
generator (horovod_powersgd.compressors), of PowerSGD as of the others.

Words: an n x m matrix has the factors P (n x r) and Q (m x r); `delta` is gradient plus memory.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from horovod_powersgd import arrays, quantization, rounding
from horovod_powersgd.arguments import required_compressor
from horovod_powersgd.compressors.accordion import Accordion, Regime
from horovod_powersgd.compressors.collectives import Allgather, AllreduceMean, QuantizedMean
from horovod_powersgd.compressors.compressor import Compressor
from horovod_powersgd.compressors.matrix_state import MatrixState
from horovod_powersgd.factors import initial_factor, orthogonalize, resized  # noqa: F401  (offered here as well)
from horovod_powersgd.layout import Layout, layout_of, leading_rows
from horovod_powersgd.randomness import key_of

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
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    factors: dict[str, Factor] = field(default_factory=dict)
    kept: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    regimes: dict[str, Regime] = field(default_factory=dict)


def exchange(
    gradients: Tensors,
    state: State,
    config: Compressor,
    matrix_shape=leading_rows,
    worker: int = 0,
    workers: int = 1,
    learning_rate: float | None = None,
) -> Generator[AllreduceMean | QuantizedMean | Allgather, Mapping, dict[str, np.ndarray]]:
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
    config = required_compressor(config)
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
        quantized = {name: m.parts()[0] for name, m in asking.items() if isinstance(m.request, QuantizedMean)}
        answers: dict[str, Any] = {}
        if means or waiting:
            answers.update((yield AllreduceMean({**means, **{name: plain[name] for name in waiting}})))
        if gathers:
            answers.update((yield Allgather(gathers)))
        if quantized:
            rows = {name: asking[name].request.row for name in quantized}
            answers.update((yield QuantizedMean(quantized, rows)))
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
        update: what it returned; NaN where an answer was not finite.
    """

    def __init__(self, name, gradient, layout: Layout, state: State, config: Compressor, worker, workers, rate):
        self.name, self._config, self._failed, amount = name, config, False, layout.amount
        if isinstance(config, Accordion):
            self._regime = state.regimes.get(name, Regime()).decided(config, state.steps, rate, _norm)
            amount = config.amount_now(*layout.matrix, self._regime.is_low)
        self._delta = gradient.reshape(layout.matrix)
        if config.keeps_memory:
            self._delta = self._delta + state.memory.get(name, 0)
        self._finite = bool(np.isfinite(self._delta).all())
        if not self._finite:
            self._delta = np.zeros_like(self._delta)
        kept: dict[str, Any] = dict(state.kept.get(name, {}))
        if name in state.factors:
            kept.update(factor=state.factors[name].array, factor_is_q=state.factors[name].is_q)
        self._state = MatrixState(arrays, name, layout.matrix, key_of(name, config.seed), kept)
        self._state.begin(state.steps, amount, worker, workers, self._finite)
        self._generator = config.family.exchange(self._delta, self._state)
        self._resume(None)

    def parts(self) -> list[np.ndarray]:
        """What it asks for, to be sent: floats become NaN where this worker's delta was not finite."""
        request = self.request
        tensors = list(request.tensors) if isinstance(request, Allgather) else [request.tensors]
        if not self._finite:
            tensors = [np.full_like(t, np.nan) if t.dtype.kind == "f" else t for t in tensors]
        return tensors

    def go_on(self, answer) -> None:
        """Takes the answer. What is not finite goes on as zeros, on all workers: they let the generator finish, and the
        step is discarded."""
        answers = [answer] if isinstance(answer, np.ndarray) else list(answer)
        if not all(np.isfinite(part).all() for part in answers):
            self._failed = True
            answers = [np.zeros_like(part) for part in answers]
        self._resume(answers[0] if isinstance(answer, np.ndarray) else answers)

    def _resume(self, answer) -> None:
        try:
            # What overflows becomes infinite and fails the step.
            with np.errstate(invalid="ignore", over="ignore"):
                self.request = self._generator.send(answer)
        except StopIteration as finished:
            self.request = None
            update, self._sent = finished.value
            self.update = np.full_like(update, np.nan) if self._failed else update

    def keep(self, state: State) -> None:
        """Keeps what the next step needs."""
        kept = dict(self._state.kept)
        if self._config.low_rank and "factor" in kept:
            state.factors[self.name] = Factor(kept.pop("factor"), bool(kept.pop("factor_is_q", True)))
        if kept:
            state.kept[self.name] = kept
        if self._config.keeps_memory:
            memory = self._delta - self._sent.reshape(self._delta.shape)                      # delta_w - P^ Q_w^T
            dtype = self._config.family.memory_dtype
            state.memory[self.name] = memory if dtype is None else self._rounded(memory, dtype)
        if isinstance(self._config, Accordion):
            update = self.update.reshape(self._delta.shape)
            self._regime.total = update if self._regime.total is None else self._regime.total + update
            state.regimes[self.name] = self._regime

    def _rounded(self, memory: np.ndarray, dtype: str) -> np.ndarray:
        of = self._state
        rows, columns = rounding.of_rows_and_columns(arrays, of.key, *of.shape)
        rows += np.int32(rounding.of_step(arrays, of.step, of.worker))
        return rounding.rounded(arrays, memory, dtype, rows, columns)


def _norm(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix.astype(np.float64)))


def simulate(
    gradients: Sequence[Tensors],
    states: Sequence[State],
    config: Compressor,
    matrix_shape=leading_rows,
    learning_rate: float | None = None,
    workers_per_host: int = 1,
) -> list[dict[str, np.ndarray]]:
    """One step of W workers in this process, in lockstep.

    Args:
        gradients: each worker's, host by host.
        states: each host's, in the same order; changed.
        (the others): as exchange's.
        workers_per_host: in an exchange of two levels (horovod_powersgd.hosts). 1: each worker is a host of its own.

    Returns:
        Each worker's updates; they are equal.
    """
    hosts = [_mean(gradients[i : i + workers_per_host]) for i in range(0, len(gradients), workers_per_host)]
    updates = lockstep(
        [
            exchange(g, s, config, matrix_shape, host, len(states), learning_rate)
            for host, (g, s) in enumerate(zip(hosts, states, strict=True))
        ]
    )
    return [update for update in updates for _ in range(workers_per_host)]


def _mean(everyones: Sequence[Tensors]) -> Tensors:
    return {name: np.mean([theirs[name] for theirs in everyones], axis=0) for name in everyones[0]}


def communicate(
    comm, gradients: Tensors, state: State, config: Compressor, matrix_shape=leading_rows, learning_rate=None
):
    """One step of this process's worker, with the other processes of an mpi4py communicator.

    Returns:
        The updates, the same on every worker, bit for bit those of `simulate` with the same gradients.
    """
    return over(comm, exchange(gradients, state, config, matrix_shape, comm.rank, comm.size, learning_rate))


def lockstep(workers: Sequence[Generator[Any, Any, Any]]) -> list:
    """Runs the generators of all workers, answering each round's requests; returns their results."""
    requests = [next(worker) for worker in workers]
    while True:
        answers = _answers(requests)
        results, requests = [], []
        for worker, answer in zip(workers, answers):
            try:
                requests.append(worker.send(answer))
            except StopIteration as finished:
                results.append(finished.value)
        if results:
            return results


def over(comm, worker: Generator[Any, Any, Any]):
    """Runs one worker's generator over an mpi4py communicator; returns its result."""
    request = next(worker)
    while True:
        try:
            request = worker.send(_answers(comm.allgather(request))[comm.rank])
        except StopIteration as finished:
            return finished.value


def _answers(requests: Sequence[AllreduceMean | QuantizedMean | Allgather]) -> list[dict[str, Any]]:
    """What each of the workers gets that ask for this."""
    everyone, workers = [request.tensors for request in requests], len(requests)
    if isinstance(requests[0], Allgather):
        gathered = {name: [np.stack(parts) for parts in zip(*(t[name] for t in everyone))] for name in everyone[0]}
        return [gathered] * workers
    with np.errstate(invalid="ignore", over="ignore"):
        if isinstance(requests[0], QuantizedMean):
            return _quantized_means(everyone, requests[0])
        # Divided before it is summed, so that half precision does not overflow.
        means = {
            name: sum(tensors[name] / tensors[name].dtype.type(workers) for tensors in everyone)
            for name in everyone[0]
        }
    return [means] * workers


def _quantized_means(everyone: Sequence[Tensors], request: QuantizedMean) -> list[dict[str, Any]]:
    """The matrices of one dtype travel together, as in a bucket: the last gradient first."""
    answers: list[dict[str, Any]] = [{} for _ in everyone]
    for dtype in {matrix.dtype for matrix in everyone[0].values()}:
        matrices = {name: matrix for name, matrix in reversed(list(everyone[0].items())) if matrix.dtype == dtype}
        rows = [pair for name, m in matrices.items() for pair in quantization.rows_of(m.shape, request.row[name])]
        lengths = np.repeat([length for _, length in rows], [count for count, _ in rows])
        flat = [np.concatenate([theirs[name].reshape(-1) for name in matrices]) for theirs in everyone]
        mean, parts = quantization.mean(flat, lengths)
        ends = np.cumsum([matrix.size for matrix in matrices.values()])[:-1]
        for answer, part in zip(answers, parts):
            for (name, matrix), *both in zip(matrices.items(), np.split(mean, ends), np.split(part, ends)):
                answer[name] = [array.reshape(matrix.shape) for array in both]
    return answers


@dataclass
class OptimizerState:
    """Algorithm 2's state of one worker: what the exchange keeps, and the momentum by tensor name."""

    exchange: State = field(default_factory=State)
    momentum: dict[str, np.ndarray] = field(default_factory=dict)


def algorithm_2(
    parameters: dict[str, np.ndarray],
    gradients: Tensors,
    state: OptimizerState,
    config: Compressor,
    learning_rate: float,
    momentum: float,
) -> Generator[AllreduceMean | QuantizedMean | Allgather, Mapping, None]:
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
