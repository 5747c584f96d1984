"""Handwritten digits with PyTorch and Horovod: a small convolutional network on scikit-learn's digits.

    horovodrun -np 2 python examples/torch_digits.py --compression powersgd --rank 4
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import horovod_powersgd.torch as hvd


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", choices=["none", "fp16", "powersgd"], default="powersgd")
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD's factors")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="of each worker")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of one worker")
    parser.add_argument("--results", metavar="FILE", help="write the result there, as JSON")
    return parser.parse_args()


def digits():
    """1347 training and 450 test images of 8 x 8 pixels, between 0 and 1, with their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, test = train_test_split(range(len(labels)), test_size=450, random_state=0, stratify=labels)
    data = TensorDataset(images, torch.tensor(labels))
    return TensorDataset(*data[train]), TensorDataset(*data[test])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def accuracy(model, loader):
    """The part of all workers' test images that is recognised."""
    model.eval()
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum() for images, labels in loader)
    model.train()
    counts = torch.tensor([float(right), float(len(loader.sampler))])
    right, all_images = hvd.allreduce(counts, name="accuracy", op=hvd.Sum)
    return float(right / all_images)


def bytes_per_step(optimizer, compression):
    """What this worker hands to allreduce in a step."""
    if compression == "powersgd":
        stats = optimizer.compression_stats()
        return stats.bytes_sent, stats.ratio
    numbers = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return numbers * (2 if compression == "fp16" else 4), 2.0 if compression == "fp16" else 1.0


def main():
    args = parse_arguments()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    train, test = digits()
    share = dict(num_replicas=hvd.size(), rank=hvd.rank())
    sampler = DistributedSampler(train, seed=args.seed, **share)
    train_loader = DataLoader(train, args.batch_size, sampler=sampler)
    test_loader = DataLoader(test, 150, sampler=range(hvd.rank(), len(test), hvd.size()))

    model = network()
    # As many workers, as many times larger a batch: so is the learning rate.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16, "powersgd": hvd.PowerSGD(rank=args.rank)}
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression[args.compression]
    )

    batch_ms = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in train_loader:
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            batch_ms.append((time.perf_counter() - start) * 1000)
        test_accuracy = accuracy(model, test_loader)
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1:3}  loss {loss.item():.4f}  test accuracy {test_accuracy:.4f}", flush=True)

    if hvd.rank() == 0:
        sent, ratio = bytes_per_step(optimizer, args.compression)
        result = {
            "compression": args.compression,
            "rank": args.rank if args.compression == "powersgd" else None,
            "test_accuracy": test_accuracy,
            "bytes_per_epoch": sent * len(train_loader),
            "ratio": ratio,
            "ms_per_batch": statistics.median(batch_ms),
        }
        print(json.dumps(result))
        if args.results:
            with open(args.results, "w") as file:
                json.dump(result, file)


if __name__ == "__main__":
    main()
