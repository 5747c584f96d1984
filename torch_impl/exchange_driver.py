"""What lets the exchanges of a step's buckets go on."""

import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from horovod_powersgd.torch.futures import Future
from horovod_powersgd.torch.gradient import PlainGradient
from horovod_powersgd.torch.step import Verdict
from horovod_powersgd.torch.streams import Streams

# Between two looks at what has come, where several optimizers are waited for at once.
POLL_SECONDS = 1e-4

# Yields what it waits for, and is resumed with the result of that.
Exchange = Generator[Future, Any, None]


class ExchangeDriver:
    """Resumes each exchange as soon as what it waits for is there, whatever the others do.

    Args:
        streams: that the exchanges' work is queued in.
    """

    def __init__(self, streams: Streams):
        self._streams = streams
        self._waiting: dict[Exchange, Future] = {}
        # Of these, who waits for a gradient, by the gradient; and who for other workers, in the order of sending.
        self._by_gradient: dict[PlainGradient, Exchange] = {}
        self._sent: dict[Exchange, None] = {}

    @property
    def busy(self) -> bool:
        """Whether there are exchanges that have not ended."""
        return bool(self._waiting)

    @torch.no_grad()
    def begin(self, exchange: Exchange) -> None:
        """Takes in an exchange, and lets it say what it waits for first."""
        self._wait(exchange, next(exchange))

    def forget(self) -> None:
        """Drops all exchanges, wherever they are."""
        self._waiting, self._by_gradient, self._sent = {}, {}, {}

    def resume(self) -> None:
        """Lets every exchange go on that has what it waits for."""
        for exchange in list(self._waiting):
            self._run(exchange)

    def resume_with(self, gradient: PlainGradient) -> None:
        """Lets the exchange go on that waits for this gradient, and then those that other workers have answered, in the
        order in which they were sent: there may be hundreds, and asking each for each gradient would take long."""
        exchange = self._by_gradient.get(gradient)
        if exchange is not None:
            self._run(exchange)
        while self._sent:
            exchange = next(iter(self._sent))
            if not self._waiting[exchange].done():
                return
            self._run(exchange)

    def drive(self, resume_others: Callable[[], bool]) -> None:
        """Lets the exchanges go on until all of them wait for the verdict.

        Args:
            resume_others: lets the exchanges of other optimizers go on meanwhile; whether there are any.
        """
        self.resume()
        while sent := [item for item in self._waiting.items() if not isinstance(item[1], Verdict)]:
            if not resume_others():
                self._go_on(*sent[0])
            elif not any(awaited.done() for _, awaited in sent):
                time.sleep(POLL_SECONDS)
            self.resume()

    def _run(self, exchange: Exchange) -> None:
        """Lets an exchange go on as far as it can."""
        awaited: Future | None = self._waiting[exchange]
        while awaited is not None and awaited.done():
            awaited = self._go_on(exchange, awaited)

    def _wait(self, exchange: Exchange, awaited: Future) -> Future:
        self._waiting[exchange] = awaited
        if isinstance(awaited, PlainGradient):
            self._by_gradient[awaited] = exchange
        elif not isinstance(awaited, Verdict):
            self._sent[exchange] = None
        return awaited

    @torch.no_grad()
    def _go_on(self, exchange: Exchange, awaited: Future) -> Future | None:
        """Resumes an exchange with what it waits for; returns what it waits for next, or None at its end."""
        if isinstance(awaited, PlainGradient):
            self._by_gradient.pop(awaited, None)
        self._sent.pop(exchange, None)
        try:
            with self._streams.current():
                following = exchange.send(awaited.result())
            return self._wait(exchange, following)
        except StopIteration:
            del self._waiting[exchange]
            return None
