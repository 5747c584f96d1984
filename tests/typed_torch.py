"""What users write, in PyTorch: checked by mypy --strict (make lint), not run."""

import torch

import horovod_powersgd.torch as hvd
from horovod_powersgd.layout import trailing_columns

hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * hvd.size(), momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
for compression in (hvd.PowerSGD(rank=4), hvd.TopK(0.1), hvd.Compression.none, hvd.Compression.fp16):
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression, op=hvd.Average)
model(torch.ones(2, 8)).sum().backward()
optimizer.step()

adaptive = hvd.Accordion(hvd.PowerSGD(4), hvd.PowerSGD(1), interval=100)
distributed = hvd.DistributedOptimizer(hvd.ErrorFeedbackSGD(model.parameters()), compression=adaptive)
stats: hvd.CompressionStats = distributed.compression_stats()
ratio: float = stats.ratio
reasons = [tensor.reason or "compressed" for tensor in stats.tensors]
traffic: hvd.Traffic = hvd.PowerSGD(rank=2).traffic([(64, 64)], workers=hvd.size(), matrix_shape=trailing_columns)
mean = hvd.allreduce(torch.tensor(ratio), name="ratio", op=hvd.Sum)
state = hvd.elastic.TorchState(model=model, optimizer=optimizer)
hvd.assert_replicas_equal(model)
last: int = hvd.join()
hvd.activate(compression=hvd.PowerSGD(rank=4))
hvd.deactivate()
