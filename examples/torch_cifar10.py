"""CIFAR-10 with PyTorch and Horovod: ResNet-18, learning-rate warm-up and step decay, as in the PowerSGD paper.

    horovodrun -np 2 python examples/torch_cifar10.py --data-dir cifar-10-batches-py --compression powersgd --rank 4

Without --data-dir it learns synthetic images. The defaults are the paper's (Vogels et al., NeurIPS 2019), which are
meant for GPUs; to see it work on a CPU, add --batch-size 8 --max-steps 20.
"""

import argparse
import json
import os
import pickle
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import horovod_powersgd.torch as hvd

WARMUP_EPOCHS = 5
DECAYS = 150 / 300, 250 / 300  # the parts of all epochs after which the learning rate falls to a tenth


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="has data_batch_1 to data_batch_5 and test_batch")
    parser.add_argument("--compression", choices=["none", "fp16", "powersgd"], default="powersgd")
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD's factors")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument(
        "--max-steps", type=int, default=sys.maxsize, help="end this run after so many, and evaluations, too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128, help="of each worker")
    parser.add_argument("--lr", type=float, help="learning rate of one worker (default: 0.1 for a batch of 128)")
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint (one an epoch)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"))
    args = parser.parse_args()
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 128
    return args


def say(text):
    """Prints on worker 0."""
    if hvd.rank() == 0:
        print(text, flush=True)


def cifar10(folder):
    """The 50,000 training and 10,000 test images of shape (3, 32, 32), of bytes, with their labels."""
    parts = []
    for names in [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]:
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        pixels = torch.from_numpy(np.concatenate([batch[b"data"] for batch in batches])).view(-1, 3, 32, 32)
        parts.append(TensorDataset(pixels, torch.from_numpy(np.concatenate([batch[b"labels"] for batch in batches]))))
    return parts


def synthetic():
    """4,096 and 512 images of the same kind: one of ten blurred patterns, half covered by noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.rand(10, 3, 4, 4, generator=generator), (32, 32), mode="bilinear")
    parts = []
    for size in (4096, 512):
        labels = torch.arange(size) % 10
        noise = torch.rand(size, 3, 32, 32, generator=generator)
        parts.append(TensorDataset(((patterns[labels] + noise) * 127).byte(), labels))
    return parts


def normalized(pixels):
    """Of mean 0 and standard deviation 1 over CIFAR-10, for each colour."""
    mean, deviation = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]).view(2, 3, 1, 1)
    return (pixels / 255 - mean) / deviation


def augmented(inputs):
    """Flipped by chance, padded by 4 pixels all round, and cropped to the old size anywhere."""
    flip = torch.rand(len(inputs), 1, 1, 1) < 0.5
    padded = F.pad(torch.where(flip, inputs.flip(3), inputs), (4, 4, 4, 4))
    corners = torch.randint(0, 9, (len(inputs), 2)).tolist()
    return torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, corners)])


def convolution(inputs, outputs, size, stride=1):
    """With batch normalization."""
    convolve = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolve, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, inputs):
        return F.relu(self.second(F.relu(self.first(inputs))) + self.shortcut(inputs))


def resnet18():
    """For small images: a 3 x 3 convolution first, and no pooling after it."""
    layers, inputs = [convolution(3, 64, 3), nn.ReLU()], 64
    for outputs, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        layers.append(Block(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


@torch.no_grad()
def accuracy(model, loader, most_batches, device, autocast):
    """The part of all workers' test images that is recognised."""
    model.eval()
    right = seen = 0
    for pixels, labels in islice(loader, most_batches):
        with autocast:
            recognised = model(normalized(pixels).to(device)).argmax(1)
        right += (recognised.cpu() == labels).sum().item()
        seen += len(labels)
    model.train()
    right, seen = hvd.allreduce(torch.tensor([float(right), float(seen)]), name="accuracy", op=hvd.Sum).tolist()
    return right / seen


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
    return folder / f"cifar10-compression-{number % 2}-of-worker-{worker}.pt"


def save_checkpoint(args, number, epochs_done, model, optimizer, scaler):
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    if args.compression == "powersgd":
        write(optimizer.compression_state_dict(), memory_file(args.checkpoint_dir, number, hvd.rank()))
    hvd.barrier()  # The files of all workers are there.
    if hvd.rank() == 0:
        memories = hvd.size() if args.compression == "powersgd" else 0
        progress = {"number": number, "epochs_done": epochs_done, "memories": memories}
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        write(progress | states, args.checkpoint_dir / "cifar10.pt")


def start(args, model, optimizer, scaler):
    """Gives all workers the same model, that of the checkpoint to resume. Returns its number and the epochs done."""
    file = args.checkpoint_dir / "cifar10.pt"
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

    train, test = cifar10(args.data_dir) if args.data_dir else synthetic()
    say(f"Data: {args.data_dir or 'synthetic images, NOT CIFAR-10 (no --data-dir): only the shape is the same'}")
    say(f"{len(train)} images to train on, {len(test)} to test")
    sampler = DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed)
    train_loader = DataLoader(train, args.batch_size, sampler=sampler)
    test_loader = DataLoader(test, args.batch_size, sampler=range(hvd.rank(), len(test), hvd.size()))

    model = resnet18().to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16, "powersgd": hvd.PowerSGD(rank=args.rank)}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(groups, lr=args.lr, momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=compression[args.compression],
    )
    # Neither does anything without --amp.
    autocast = torch.autocast(device.type, {"cuda": torch.float16, "cpu": torch.bfloat16}[device.type], args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp)
    if args.compression == "powersgd":
        optimizer.follow_loss_scale(scaler)
    number, epochs_done = start(args, model, optimizer, scaler)

    batches = len(train_loader)
    batch_ms = []
    for epoch in range(epochs_done, args.epochs):
        sampler.set_epoch(epoch)
        # Augmentation differs between workers, and is the same in a resumed epoch.
        torch.manual_seed((args.seed * 1000 + epoch) * hvd.size() + hvd.rank())
        losses = []
        for pixels, labels in islice(train_loader, args.max_steps - len(batch_ms)):
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch + len(losses) / batches)
            optimizer.zero_grad()
            with autocast:
                scores = model(augmented(normalized(pixels)).to(device))
                loss = F.cross_entropy(scores, labels.to(device))
            scaler.scale(loss).backward()
            optimizer.synchronize()  # All workers' gradients are here before the scaler looks at them.
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            batch_ms.append((time.perf_counter() - begin) * 1000)
            if len(losses) % 50 == 0:
                say(f"epoch {epoch + 1:3}  batch {len(losses):5}/{batches}  loss {statistics.mean(losses[-50:]):.4f}")
        test_accuracy = accuracy(model, test_loader, args.max_steps, device, autocast)
        say(f"epoch {epoch + 1:3}  loss {statistics.mean(losses):.4f}  test accuracy {test_accuracy:.4f}")
        number += 1
        # An epoch that --max-steps cuts short is done again by --resume.
        save_checkpoint(args, number, epoch + (len(losses) == batches), model, optimizer, scaler)
        if len(batch_ms) == args.max_steps:
            break

    test_accuracy = accuracy(model, test_loader, args.max_steps, device, autocast)
    if hvd.rank() == 0:
        sent, ratio = bytes_per_step(optimizer, args.compression)
        result = {
            "compression": args.compression,
            "rank": args.rank if args.compression == "powersgd" else None,
            "test_accuracy": test_accuracy,
            "bytes_per_step": sent,
            "ratio": ratio,
            "ms_per_batch": statistics.median(batch_ms) if batch_ms else None,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
