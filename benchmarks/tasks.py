"""What train.py trains: a language model on Python's own sources, and an image classifier on handwritten digits."""

import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


@dataclass(frozen=True)
class Task:
    """A model to train, and data.

    Attributes:
        description: what learns what, and to which loss.
        model: makes it.
        data: loads ((inputs, labels) to train on, (inputs, labels) to validate).
        batch: examples in a step, of all workers together.
        learning_rate: after the warm-up, in the first WARMUP steps.
        target: the validation loss at which the training ends.
    """

    title: str
    description: str
    model: Callable
    data: Callable
    batch: int
    learning_rate: float
    target: float


WARMUP = 10
LARGEST_NORM = 0.4  # to which the averaged gradient is clipped
WORDS, SEQUENCE = 28869, 16


class LanguageModel(nn.Module):
    """The PowerSGD paper's, with one layer in place of three: what scores words shares the embedding's matrix."""

    def __init__(self, units=650):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, units)
        self.lstm = nn.LSTM(units, units, batch_first=True)
        self.scores = nn.Linear(units, WORDS)
        self.scores.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.scores.bias)

    def forward(self, words):
        output, _ = self.lstm(self.embedding(words))
        return self.scores(output)


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.inner = nn.Sequential(
            *_convolution(inputs, outputs, 3, stride), nn.ReLU(), *_convolution(outputs, outputs, 3, 1)
        )
        self.around = nn.Identity() if inputs == outputs else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, images):
        return F.relu(self.inner(images) + self.around(images))


def _convolution(inputs, outputs, size, stride):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


def resnet18():
    """For small images, as in the PowerSGD paper, but with one channel."""
    layers, inputs = [*_convolution(1, 64, 3, 1), nn.ReLU()], 64
    for outputs in (64, 128, 256, 512):
        layers += [Block(inputs, outputs, 1 if inputs == outputs else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def standard_library():
    """Sequences of words of this Python's sources, and the words that follow each; every 20th file validates."""
    folder = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "encodings"}
    files = sorted(file for file in folder.rglob("*.py") if not others.intersection(file.relative_to(folder).parts))
    texts = [re.findall(r"\w+|[^\w\s]|\n", file.read_text(encoding="utf-8", errors="replace")) for file in files]
    parts = [[word for i, text in enumerate(texts) if (i % 20 == 0) == held for word in text] for held in (False, True)]
    numbers = {word: i for i, (word, _) in enumerate(Counter(parts[0]).most_common(WORDS - 1), start=1)}
    found = []
    for words in parts:
        words = torch.tensor([numbers.get(word, 0) for word in words])
        length = (len(words) - 1) // SEQUENCE * SEQUENCE
        found.append((words[:length].view(-1, SEQUENCE), words[1 : length + 1].view(-1, SEQUENCE)))
    train, (inputs, labels) = found
    some = torch.arange(0, len(inputs), len(inputs) // 64)[:64]
    return train, (inputs[some], labels[some])


def digits():
    """scikit-learn's, enlarged to 16 x 16; a quarter of them validates."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images, labels = F.interpolate(images, scale_factor=2, mode="bilinear"), torch.tensor(data.target)
    held = torch.arange(len(labels)) % 4 == 0
    return (images[~held], labels[~held]), (images[held], labels[held])


TASKS = {
    "lstm": Task(
        title="LSTM language model",
        description="an LSTM with 22.2 M parameters learns the words of Python's standard library, to a validation "
        "loss of 5.0",
        model=LanguageModel,
        data=standard_library,
        batch=8,
        learning_rate=2.0,
        target=5.0,
    ),
    "resnet18": Task(
        title="ResNet-18 on digits",
        description="a ResNet-18 with 11.2 M parameters learns scikit-learn's handwritten digits, to a validation loss "
        "of 0.2",
        model=resnet18,
        data=digits,
        batch=32,
        learning_rate=0.05,
        target=0.2,
    ),
}
