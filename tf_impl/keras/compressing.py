"""The methods of distributed Keras optimizers that compress."""

from collections.abc import Iterable, Mapping

from horovod_powersgd.statistics import CompressionStats
from horovod_powersgd.tensorflow.keras.aggregation import Aggregation


class CompressingMethods:
    """A mixin: in the method resolution order it comes before DistributedMethods."""

    _aggregation: Aggregation

    def compression_stats(self) -> CompressionStats:
        """What compression did in the last step and in all steps so far, for this worker.

        Raises:
            RuntimeError: nothing was compressed yet.
        """
        exchange = self._aggregation.reduction.exchange
        if exchange is None:
            raise RuntimeError("this optimizer has compressed nothing yet")
        return exchange.stats()

    def compression_state_dict(self) -> dict[str, object]:
        """What the compressor keeps, and this worker's memory: what a resumed run needs beside model and optimizer.

        Returns:
            Numbers, strings and numpy arrays, for pickle or numpy.save. Every worker saves its own.

        Raises:
            RuntimeError: nothing was compressed yet.
        """
        return self._aggregation.reduction.state_dict(self._aggregation.variables)

    def load_compression_state_dict(self, states: Mapping | Iterable[Mapping]) -> None:
        """Goes on where compression_state_dict was called; in the first step, where that is still to come.

        Args:
            states: what this worker saved; or what all workers saved, in the workers' order. Another number of
                workers than then needs all of them: the memories are shared out so that their mean stays.

        Raises:
            ValueError: another model or compressor, or states are missing. It names what differs.
        """
        aggregation = self._aggregation
        aggregation.variables = aggregation.variables or getattr(self, "_trainable_variables", ())
        if aggregation.variables:
            aggregation.load(states)
        else:
            aggregation.saved_states = states
