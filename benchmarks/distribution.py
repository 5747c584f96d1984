"""Gives a PyTorch model and its optimizer one of the methods of exchanging gradients."""

import horovod.torch as horovod
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import horovod_powersgd.torch as hvd
from methods import METHODS


def distribute(key, model, optimizer):
    """What then stands for the model and for the optimizer.

    DDP's backward exchanges the gradients; the Horovod optimizers' step() has to be called after it, or synchronize().
    """
    method = METHODS[key]
    if method.library is None:
        return model, optimizer
    if method.library == "ddp":
        return _parallel(method, model), optimizer
    named = list(model.named_parameters())
    if method.library == "ours":
        return model, hvd.DistributedOptimizer(optimizer, named, compression=method.config)
    compression = getattr(horovod.Compression, method.compression)
    return model, horovod.DistributedOptimizer(optimizer, named, compression=compression)


def _parallel(method, model):
    if method.compression != "powersgd":
        parallel = DistributedDataParallel(model)
        if method.compression == "fp16":
            parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return parallel
    # With more than one bucket, the hook's collectives come in another order on every worker: the job ends or hangs.
    parallel = DistributedDataParallel(model, bucket_cap_mb=1 << 20)
    state = powerSGD_hook.PowerSGDState(None, method.rank, start_powerSGD_iter=2)
    parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return parallel
