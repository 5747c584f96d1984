"""A worker of large.py: one training.

large_worker.py RUN FOLDER FILE     # JSON; where the words are; for the results
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "examples"))

from torch_lm import LanguageModel  # noqa: E402

import horovod_powersgd.torch as hvd  # noqa: E402
from compressions import METHODS, Model  # noqa: E402

VOCABULARY = 28869  # WikiText-2's without what is rare there
WARMUP = 0.05  # the part of the steps in which the learning rate rises; then it falls as half a cosine
EVALUATIONS = 10
VALID_WORDS = 200_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Layer(nn.Module):
    """A transformer's: causal attention, then two dense ones; each after a normalization, with a way around."""

    def __init__(self, width, heads):
        super().__init__()
        self._heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self._heads, -1)).transpose(1, 2) for part in self.attention(self.before(x)).chunk(3, 2)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.dense(self.between(x))


class Transformer(nn.Module):
    """As GPT-2's, and smaller; what scores words shares the embedding's matrix."""

    def __init__(self, length, width=512, layers=8, heads=8):
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.layers, self.last = nn.Sequential(*(Layer(width, heads) for _ in range(layers))), nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, words, following, hidden):
        """The loss; words are (length, batch), as those of the LSTM."""
        x = self.embedding(words.t()) + self.places.weight[: len(words)]
        scores = self.last(self.layers(x)) @ self.embedding.weight.t()
        return F.cross_entropy(scores.flatten(0, 1), following.t().flatten()), None


@dataclass(frozen=True)
class Learner:
    """A model and how it is trained.

    Attributes:
        model, optimizer: make them; of the learning rate.
        batch, length: of a step of all workers together: columns of words, and how many of each.
        largest_norm: to which the averaged gradient is clipped.
        halves: whether it computes in bfloat16 where PyTorch's autocast does.
    """

    model: Callable
    optimizer: Callable
    rate: float
    batch: int
    length: int
    steps: int
    largest_norm: float
    halves: bool = False


LEARNERS = {
    "lstm": Learner(
        lambda: LanguageModel(VOCABULARY, dropout=0.0),
        lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9),
        rate=2.0,
        batch=64,
        length=32,
        steps=5000,
        largest_norm=0.4,
    ),
    "transformer": Learner(
        lambda: Transformer(128),
        lambda parameters, rate: torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.1),
        rate=1e-3,
        batch=32,
        length=128,
        steps=5000,
        largest_norm=1.0,
        halves=True,
    ),
}


class Training:
    """A worker's part of a training."""

    def __init__(self, run, folder):
        self._learner, self._run = LEARNERS[run["model"]], run
        self._train, self._valid = (self._columns(folder / f"{name}.npy") for name in ("train", "valid"))
        self._valid = self._valid[: VALID_WORDS // self._learner.batch]
        torch.manual_seed(run["seed"])
        self._model = self._learner.model().to(DEVICE)
        optimizer = self._learner.optimizer(self._model.parameters(), self._learner.rate)
        compression = METHODS[run["method"]].compression
        if isinstance(compression, str):
            compression = getattr(hvd.Compression, compression)
        else:
            shapes = [tuple(parameter.shape) for parameter in self._model.parameters()]
            compression = compression(Model(shapes, interval=run["steps"] // EVALUATIONS))
        self._optimizer = hvd.DistributedOptimizer(optimizer, self._model.named_parameters(), compression=compression)

    def _columns(self, file):
        """This worker's columns of the words, as they are shared out in every step."""
        words, batch = torch.from_numpy(np.load(file)), self._learner.batch
        length = len(words) // batch
        return words[: length * batch].view(batch, length)[hvd.rank() :: hvd.size()].t().contiguous().to(DEVICE)

    def _batches(self, words):
        """(words, those that follow each) of each step, and whether the columns begin again."""
        length, start = self._learner.length, 0
        while True:
            if start + length >= len(words):
                start = 0
            yield words[start : start + length], words[start + 1 : start + length + 1], start == 0
            start += length

    def _loss(self, words, following, hidden):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self._learner.halves):
            return self._model(words, following, hidden)

    def run(self):
        """Trains; the results, the same on every worker."""
        hidden, curve, seconds, norms, steps = None, [], [], [], self._run["steps"]
        for step, (words, following, begins) in zip(range(steps), self._batches(self._train)):
            began, done = time.perf_counter(), step / steps
            factor = min(done / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - WARMUP) / (1 - WARMUP)))
            for group in self._optimizer.param_groups:
                group["lr"] = self._learner.rate * self._run["rate"] * factor
            loss, hidden = self._loss(words, following, None if begins else hidden)
            hidden = None if hidden is None else tuple(state.detach() for state in hidden)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.synchronize()
            norms.append(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._learner.largest_norm))
            with self._optimizer.skip_synchronize():
                self._optimizer.step()
            seconds.append(time.perf_counter() - began)
            if (step + 1) % (steps // EVALUATIONS) == 0:
                curve.append([step + 1, round(self._perplexity(), 3)])
                if hvd.rank() == 0:
                    print(self._run, curve[-1], f"{1000 * statistics.median(seconds):.1f} ms", flush=True)
        numbers = sum(parameter.numel() for parameter in self._model.parameters())
        sent = 4 * numbers
        if hasattr(self._optimizer, "compression_stats"):
            stats = self._optimizer.compression_stats()
            sent = stats.total_bytes_sent / stats.steps
        cut = (self._learner.largest_norm / torch.stack(norms)).clamp(max=1)
        return {
            "perplexity": curve[-1][1],
            "clipped_to": cut.mean().item(),
            "curve": curve,
            "parameters": numbers,
            "megabytes": sent / 1e6,
            "ms": 1000 * statistics.median(seconds),
        }

    @torch.no_grad()
    def _perplexity(self):
        self._model.eval()
        hidden, losses = None, []
        for _, (words, following, _) in zip(
            range((len(self._valid) - 1) // self._learner.length), self._batches(self._valid)
        ):
            loss, hidden = self._loss(words, following, hidden)
            losses.append(loss.float())
        self._model.train()
        return math.exp(hvd.allreduce(torch.stack(losses).mean().cpu(), name="loss"))


def main(run, folder, file):
    hvd.init()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    found = Training(json.loads(run), Path(folder)).run()
    if hvd.rank() == 0:
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
