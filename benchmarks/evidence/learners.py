"""What learns in these measurements, and from what: a convolutional network on images, an LSTM on words.

The data ship with installed packages: scikit-learn's handwritten digits, and the sources of Python's standard library.
A folder with CIFAR-10 or WikiText-2, in their usual files, takes their place.

Batches are drawn for all workers together, the same on each of them, and shared out: what is learned from does not
depend on the number of workers. A training can be some `times` longer: so many times the epochs of the images, or
words.
"""

import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import horovod_powersgd.torch as hvd

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from torch_cifar10 import augmented, cifar10, normalized  # noqa: E402
from torch_lm import LanguageModel, numbered, standard_library, wikitext  # noqa: E402


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, chosen once for plain SGD with momentum (tuning.py), and then the same for every method.

    Attributes:
        rate: learning rate.
        epochs: all of them.
        warmup: epochs in which the learning rate rises to that.
        decays: the parts of all epochs after which it falls to a tenth.
        largest_norm: to which the averaged gradient is clipped.
        evaluations: in an epoch; Accordion decides as often.
    """

    rate: float
    epochs: int
    warmup: float
    decays: tuple
    evaluations: int
    weight_decay: float = 0.0
    momentum: float = 0.9
    largest_norm: float = math.inf

    def rate_at(self, epoch):
        """An epoch can be a fraction."""
        return self.rate * min(1, epoch / self.warmup) * 0.1 ** sum(epoch >= part * self.epochs for part in self.decays)


class Images:
    """A network of four convolutions classifies handwritten digits, or CIFAR-10; quality is the test accuracy in %.

    Digits are 8 x 8 pixels from 0 to 1, to which normal noise is added (standard deviation 0.3), new in each step, or
    nearly every network would recognise 98% of them; a third of them are the test. Of CIFAR-10, 4,992 images are
    learned, flipped and cropped at random, and 1,000 are the test, unless all are wanted.
    """

    recipe = Recipe(rate=0.1, epochs=20, warmup=2, decays=(0.5, 0.8), evaluations=1, weight_decay=1e-4)
    batch = 128
    train_images, test_images = 4992, 1000
    higher_is_better = True

    def __init__(self, folder, whole, seed, times):
        self.recipe = replace(self.recipe, epochs=times * self.recipe.epochs)
        if folder:
            sizes = (None, None) if whole else (self.train_images, self.test_images)
            parts = [[tensor[:size] for tensor in part.tensors] for part, size in zip(cifar10(folder), sizes)]
            train, test = [(normalized(pixels), labels) for pixels, labels in parts]
            self._augment = augmented
        else:
            digits = load_digits()
            pixels, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
            noise = 0.3 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
            held = torch.arange(len(labels)) % 3 == 0
            train, test = (pixels[~held], labels[~held]), ((pixels + noise)[held], labels[held])
            self._augment = lambda images: images + 0.3 * torch.randn(images.shape)
        self._train, self._test = train, _mine(test)
        self.steps_per_epoch = len(train[0]) // self.batch
        self._seed = seed
        torch.manual_seed(seed)
        self.model = _network(channels=train[0].shape[1])

    def losses(self, epoch):
        """The loss of each step, to go backward from."""
        torch.manual_seed(1000 * self._seed + epoch)
        order = torch.randperm(len(self._train[0]))
        for step in range(self.steps_per_epoch):
            batch = order[step * self.batch :][: self.batch]
            images, labels = _mine((self._augment(self._train[0][batch]), self._train[1][batch]))
            yield lambda: F.cross_entropy(self.model(images), labels)

    @torch.no_grad()
    def quality(self):
        """The same on every worker."""
        images, labels = self._test
        self.model.eval()
        right = sum((self.model(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500)))
        self.model.train()
        right, seen = hvd.allreduce(torch.tensor([float(right), float(len(labels))]), name="quality", op=hvd.Sum)
        return 100 * (right / seen).item()


class Words:
    """An LSTM learns to foresee words of Python's sources, or of WikiText-2; quality is the validation perplexity.

    Unless all are wanted, the first 40,992 words are learned, which is 80 steps an epoch, and 10,240 others validate.
    """

    recipe = Recipe(rate=2.0, epochs=3, warmup=0.5, decays=(0.6, 0.85), evaluations=4, largest_norm=0.4)
    batch, sequence = 32, 16
    train_words, valid_words = 40992, 10240
    higher_is_better = False

    def __init__(self, folder, whole, seed, times):
        sizes = (None, None) if whole else (times * self.train_words, self.valid_words)
        (train, valid), vocabulary = _corpus(folder, *sizes)
        self._train, self._valid = _columns(train, self.batch), _columns(valid, self.batch)
        self.steps_per_epoch = (len(self._train) - 1) // self.sequence
        torch.manual_seed(seed)
        self.model = LanguageModel(vocabulary, units=256, layers=1, dropout=0.0)

    def losses(self, epoch):
        """The loss of each step, to go backward from."""
        self._hidden = None
        for start in range(0, self.steps_per_epoch * self.sequence, self.sequence):
            yield lambda: self._loss(start)

    def _loss(self, start):
        words = self._train[start : start + self.sequence + 1]
        loss, hidden = self.model(words[:-1], words[1:], self._hidden)
        self._hidden = tuple(state.detach() for state in hidden)
        return loss

    @torch.no_grad()
    def quality(self):
        """The same on every worker."""
        loss, _ = self.model(self._valid[:-1], self._valid[1:], None)
        return math.exp(hvd.allreduce(loss, name="quality"))


def _network(channels, width=32):
    layers = []
    for inputs, outputs, stride in [(channels, 1, 1), (1, 2, 2), (2, 4, 2), (4, 4, 1)]:
        inputs = inputs if not layers else inputs * width
        layers += [nn.Conv2d(inputs, outputs * width, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def _mine(tensors):
    """This worker's share."""
    return [tensor[hvd.rank() :: hvd.size()] for tensor in tensors]


@functools.cache
def _corpus(folder, train_words, valid_words):
    """Words as numbers, to learn and to validate, and how many different ones there are."""
    corpus = None
    if hvd.rank() == 0:
        train, valid, _ = wikitext(folder) if folder else standard_library()
        corpus = numbered([train[:train_words], valid[:valid_words]])
    return hvd.broadcast_object(corpus, root_rank=0, name=f"corpus of {train_words}")


def _columns(words, batch):
    """This worker's columns of the words, of which all workers together have `batch`."""
    length = len(words) // batch
    return words[: length * batch].view(batch, length)[hvd.rank() :: hvd.size()].t().contiguous()


LEARNERS = {"cnn": Images, "lstm": Words}
