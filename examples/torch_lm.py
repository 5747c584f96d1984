"""A language model with PyTorch and Horovod: the PowerSGD paper's LSTM, 3 layers of 650 units with tied embeddings.

    horovodrun -np 2 python examples/torch_lm.py --data-dir wikitext-2 --compression powersgd --rank 4

Without --data-dir it learns from the sources of Python's standard library. The defaults are the paper's (Vogels et al.,
NeurIPS 2019, WikiText-2), which are meant for GPUs; to see it work on a CPU, add --batch-size 8 --max-steps 20.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import horovod_powersgd.torch as hvd

SEQUENCE = 30  # words that gradients flow back through
WARMUP_EPOCHS = 5
DECAYS = 60 / 90, 80 / 90  # the parts of all epochs after which the learning rate falls to a tenth
LARGEST_NORM = 0.4  # to which a step's averaged gradient is clipped; the paper clips each worker's


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="has wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens")
    parser.add_argument("--compression", choices=["none", "fp16", "powersgd"], default="powersgd")
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD's factors")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument(
        "--max-steps", type=int, default=sys.maxsize, help="end this run after so many, and evaluations, too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, help="of each worker")
    parser.add_argument("--lr", type=float, default=1.25, help="learning rate of one worker")
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint (one an epoch)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"))
    return parser.parse_args()


def say(text):
    """Prints on worker 0."""
    if hvd.rank() == 0:
        print(text, flush=True)


def wikitext(folder):
    """Training, validation and test words of WikiText-2; a word of its own ends each line."""
    parts = []
    for part in ("train", "valid", "test"):
        with open(folder / f"wiki.{part}.tokens", encoding="utf-8") as lines:
            parts.append([word for line in lines for word in [*line.split(), "<eos>"]])
    return parts


def standard_library():
    """The same of this Python's sources: names, numbers, single punctuation marks and line ends."""
    folder = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "encodings"}
    files = sorted(file for file in folder.rglob("*.py") if not others.intersection(file.relative_to(folder).parts))
    train, valid, test = [], [], []
    for number, file in enumerate(files):
        part = {0: valid, 10: test}.get(number % 20, train)
        part += re.findall(r"\w+|[^\w\s]|\n", file.read_text(encoding="utf-8", errors="replace"))
    return train, valid, test


def numbered(parts, vocabulary_size=None):
    """The parts with words as numbers, by frequency in the first part, and the size of the vocabulary. 0: unknown."""
    frequent = (word for word, _ in Counter(parts[0]).most_common() if word != "<unk>")
    numbers = {word: i for i, word in enumerate(islice(frequent, vocabulary_size and vocabulary_size - 1), start=1)}
    return [torch.tensor([numbers.get(word, 0) for word in part]) for part in parts], len(numbers) + 1


def columns(words, batch_size):
    """This worker's share, a contiguous part of the words, as columns: shape (words of a column, batch size)."""
    length = len(words) // hvd.size() // batch_size
    if length < 2:
        raise ValueError(f"{len(words)} words are too few for {hvd.size()} workers with batches of {batch_size}")
    share = length * batch_size
    return words[hvd.rank() * share :][:share].view(batch_size, length).t().contiguous()


def sequences(words):
    """Parts of the columns, one below the other: (words, the words that follow each)."""
    for start in range(0, len(words) - 1, SEQUENCE):
        following = words[start + 1 : start + 1 + SEQUENCE]
        yield words[start : start + len(following)], following


class LanguageModel(nn.Module):
    def __init__(self, vocabulary, units=650, layers=3, dropout=0.4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, units)
        self.lstm = nn.LSTM(units, units, layers, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(units, vocabulary)
        self.scores.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.scores.bias)

    def forward(self, words, following, hidden):
        """The loss, and the hidden state to go on with."""
        output, hidden = self.lstm(self.dropout(self.embedding(words)), hidden)
        scores = self.scores(self.dropout(output))
        return F.cross_entropy(scores.flatten(0, 1), following.flatten()), hidden


@torch.no_grad()
def perplexity(model, words, most_batches, autocast):
    """Of all workers' shares together: they are of one size."""
    model.eval()
    hidden, total, length = None, 0.0, 0
    for inputs, following in islice(sequences(words), most_batches):
        with autocast:
            loss, hidden = model(inputs, following, hidden)
        total += loss.item() * len(following)
        length += len(following)
    model.train()
    return math.exp(hvd.allreduce(torch.tensor(total / length), name="loss"))


def learning_rate(args, epoch):
    """Rises from that of one worker to as many times as much as there are workers. An epoch can be a fraction."""
    rate = args.lr * (1 + (hvd.size() - 1) * min(epoch / WARMUP_EPOCHS, 1))
    return rate * 0.1 ** sum(epoch >= part * args.epochs for part in DECAYS)


def write(state, file):
    """The file is never there in part."""
    torch.save(state, f"{file}.part")
    os.replace(f"{file}.part", file)


def memory_file(folder, number, worker):
    # Checkpoints take turns: the last one's files stay while the next one's are written.
    return folder / f"lm-compression-{number % 2}-of-worker-{worker}.pt"


def save_checkpoint(args, number, epochs_done, model, optimizer, scaler):
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    if args.compression == "powersgd":
        write(optimizer.compression_state_dict(), memory_file(args.checkpoint_dir, number, hvd.rank()))
    hvd.barrier()  # The files of all workers are there.
    if hvd.rank() == 0:
        memories = hvd.size() if args.compression == "powersgd" else 0
        progress = {"number": number, "epochs_done": epochs_done, "memories": memories}
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        write(progress | states, args.checkpoint_dir / "lm.pt")


def start(args, model, optimizer, scaler):
    """Gives all workers the same model, that of the checkpoint to resume. Returns its number and the epochs done."""
    file = args.checkpoint_dir / "lm.pt"
    checkpoint = {"number": 0, "epochs_done": 0, "memories": 0, "scaler": {}}
    if args.resume and hvd.rank() == 0 and file.exists():
        checkpoint = torch.load(file, "cpu")
        model.load_state_dict(checkpoint.pop("model"))
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
    checkpoint = hvd.broadcast_object(checkpoint, root_rank=0, name="checkpoint")
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    number, epochs_done, memories = checkpoint["number"], checkpoint["epochs_done"], checkpoint["memories"]
    if args.compression == "powersgd" and memories:
        # As many workers as before go on with their own memories; others share out all of them.
        owners = [hvd.rank()] if memories == hvd.size() else range(memories)
        states = (torch.load(memory_file(args.checkpoint_dir, number, owner), "cpu") for owner in owners)
        optimizer.load_compression_state_dict(next(states) if memories == hvd.size() else states)
    if args.resume:
        say(f"Resumed after {epochs_done} epochs from {file}" if number else f"No {file}: starting from the beginning")
    return number, epochs_done


def bytes_per_step(optimizer, compression):
    """What this worker hands to allreduce in a step, and how many times less that is than without compression."""
    if hvd.size() == 1:
        return 0, None
    if compression == "powersgd":
        stats = optimizer.compression_stats()
        return stats.bytes_sent, stats.ratio
    ratio = 2.0 if compression == "fp16" else 1.0
    return int(sum(p.numel() for group in optimizer.param_groups for p in group["params"]) * 4 / ratio), ratio


def main():
    args = parse_arguments()
    hvd.init()
    device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, torch.get_num_threads() // hvd.local_size()))
    torch.manual_seed(args.seed)

    corpus = None
    if hvd.rank() == 0:
        corpus = numbered(wikitext(args.data_dir)) if args.data_dir else numbered(standard_library(), 10_000)
    (train, valid, test), vocabulary = hvd.broadcast_object(corpus, root_rank=0, name="corpus")
    library = f"the sources of Python {sys.version.split()[0]}'s standard library, NOT WikiText-2 (no --data-dir)"
    say(f"Corpus: {args.data_dir or library}")
    say(f"{len(train)} words to train on, {len(valid)} to validate, {len(test)} to test; vocabulary {vocabulary}")
    train, valid, test = (columns(words, args.batch_size).to(device) for words in (train, valid, test))

    model = LanguageModel(vocabulary).to(device)
    compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16, "powersgd": hvd.PowerSGD(rank=args.rank)}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr),
        named_parameters=model.named_parameters(),
        compression=compression[args.compression],
    )
    # Neither does anything without --amp.
    autocast = torch.autocast(device.type, {"cuda": torch.float16, "cpu": torch.bfloat16}[device.type], args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp)
    if args.compression == "powersgd":
        optimizer.follow_loss_scale(scaler)
    number, epochs_done = start(args, model, optimizer, scaler)

    batches = math.ceil((len(train) - 1) / SEQUENCE)
    batch_ms = []
    for epoch in range(epochs_done, args.epochs):
        # Dropout differs between workers, and is the same in a resumed epoch.
        torch.manual_seed((args.seed * 1000 + epoch) * hvd.size() + hvd.rank())
        hidden, losses = None, []
        for inputs, following in islice(sequences(train), args.max_steps - len(batch_ms)):
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch + len(losses) / batches)
            optimizer.zero_grad()
            with autocast:
                loss, hidden = model(inputs, following, hidden)
            hidden = tuple(state.detach() for state in hidden)
            scaler.scale(loss).backward()
            optimizer.synchronize()  # Clipping needs the averaged gradient.
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            batch_ms.append((time.perf_counter() - begin) * 1000)
            if len(losses) % 50 == 0:
                say(f"epoch {epoch + 1:3}  batch {len(losses):5}/{batches}  loss {statistics.mean(losses[-50:]):.4f}")
        valid_perplexity = perplexity(model, valid, args.max_steps, autocast)
        say(f"epoch {epoch + 1:3}  loss {statistics.mean(losses):.4f}  validation perplexity {valid_perplexity:.2f}")
        number += 1
        # An epoch that --max-steps cuts short is done again by --resume.
        save_checkpoint(args, number, epoch + (len(losses) == batches), model, optimizer, scaler)
        if len(batch_ms) == args.max_steps:
            break

    test_perplexity = perplexity(model, test, args.max_steps, autocast)
    if hvd.rank() == 0:
        sent, ratio = bytes_per_step(optimizer, args.compression)
        result = {
            "compression": args.compression,
            "rank": args.rank if args.compression == "powersgd" else None,
            "test_perplexity": test_perplexity,
            "bytes_per_step": sent,
            "ratio": ratio,
            "ms_per_batch": statistics.median(batch_ms) if batch_ms else None,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
