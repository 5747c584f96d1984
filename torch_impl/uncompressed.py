"""Optimizers with Horovod's own compressions, in the workers' agreement."""

from collections.abc import Mapping

import torch

from horovod_powersgd.agreement import Description
from horovod_powersgd.torch import agreement
from horovod_powersgd.torch.control_messages import largest
from horovod_powersgd.torch.generation import generation
from horovod_powersgd.torch.model_description import describe, sparse_dim
from horovod_powersgd.torch.workers import Workers


class Uncompressed:
    """An optimizer with Horovod's own compression, in the workers' agreement: all it wants to know is whether the
    others have one, too.

    Attributes:
        generation: of the workers that it has agreed with.
        sparse_dims: of the gradients that are sparse on some worker; 0 for the others.
    """

    uncompressed, steps = True, 0

    def __init__(
        self,
        workers: Workers,
        agreement_on: Description,
        parameter_names: Mapping[torch.nn.Parameter, str],
        trainable: set[torch.nn.Parameter],
    ):
        self.workers, self._agreement_on = workers, agreement_on
        self._parameter_names, self._trainable = parameter_names, trainable
        self.generation: object = None
        self.sparse_dims: Mapping[torch.nn.Parameter, int] = {}
        agreement.enter(self)

    def names(self) -> list[str]:
        return list(self._parameter_names.values())

    def description(self) -> Description:
        return {
            **self._agreement_on,
            **describe([(name, p) for p, name in self._parameter_names.items() if p in self._trainable]),
        }

    def agreed(self, root: int | None, by_name: bool) -> None:
        parameters = sorted(self._parameter_names, key=lambda p: self._parameter_names[p])
        # A worker that computed no gradient cannot know that it is sparse.
        dims = largest(self.workers, [sparse_dim(p) for p in parameters], "sparse")
        self.sparse_dims = dict(zip(parameters, dims))
        self.generation = generation()
