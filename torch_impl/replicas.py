"""What makes and keeps the workers' replicas of a model equal."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from horovod.torch.functions import allgather_object, broadcast_object
from horovod.torch.mpi_ops import broadcast_async_, rank, synchronize

from horovod_powersgd.agreement import check_replicas


def broadcast_parameters(params, root_rank: int) -> None:
    """Gives all workers the root's tensors, in place; as Horovod's, and also of any dtype and memory format.

    Args:
        params: a dict of tensors (model.state_dict()), or a list of tensors or of (name, tensor)
            (list(model.named_parameters())).
        root_rank: the worker that has the right ones.

    Raises:
        ValueError: params is something else.
    """
    if isinstance(params, dict):
        named = sorted(params.items())
    elif isinstance(params, list):
        named = [p if isinstance(p, tuple) else (None, p) for p in params]
    else:
        raise ValueError(f"invalid params of type: {type(params)}")
    with torch.no_grad():
        sent = [_start_broadcast(name, tensor, root_rank) for name, tensor in named if torch.is_tensor(tensor)]
        for tensor, contiguous, handle in sent:
            synchronize(handle)
            if contiguous.data_ptr() != tensor.data_ptr():
                tensor.copy_(contiguous)


def _start_broadcast(name, tensor, root_rank):
    # Horovod wants contiguous tensors of certain dtypes; all tensors are bytes.
    contiguous = tensor.detach().contiguous()
    return tensor, contiguous, broadcast_async_(contiguous.reshape(-1).view(torch.uint8), root_rank, name)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model=None) -> None:
    """Gives all workers the root's optimizer state and hyperparameters.

    Unlike Horovod's it takes no step to make a state where there is none: parameters and step counters stay, and
    nothing is exchanged. As Horovod's, it makes gradients of zeros where there is no state and no gradient.

    Args:
        optimizer: distributed or not.
        root_rank: the worker that has the right state.
        model: names the modules whose gradients are sparse, and stay None.
    """
    if not optimizer.state and not isinstance(optimizer, torch.optim.SparseAdam):
        modules = model.modules() if model else ()
        sparse = {id(p) for m in modules if getattr(m, "sparse", False) for p in m.parameters(recurse=False)}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.requires_grad and p.grad is None and id(p) not in sparse:
                p.grad = torch.zeros_like(p)
    tensors: list[torch.Tensor] = []

    def hide(tensor):
        tensors.append(tensor)
        return _Tensor(tuple(tensor.shape), tensor.dtype)

    state = broadcast_object(_map(torch.Tensor, hide, optimizer.state_dict()), root_rank, name="optimizer state")
    if rank() != root_rank:
        tensors = []

        def make(described):
            tensors.append(torch.empty(described.shape, dtype=described.dtype))
            return tensors[-1]

        state = _map(_Tensor, make, state)
    # The others' tensors are on the CPU until the optimizer places them; so must be what the root sends.
    sent = [tensor.cpu() for tensor in tensors]
    broadcast_parameters([(f"optimizer state {i}", tensor) for i, tensor in enumerate(sent)], root_rank)
    if rank() != root_rank:
        groups = optimizer.param_groups
        optimizer.load_state_dict(state)
        # Schedulers and the wrapped optimizer hold on to the groups: they stay the same objects.
        for group, loaded in zip(groups, optimizer.param_groups):
            group.update(loaded)
        optimizer.param_groups = groups


@dataclass(frozen=True)
class _Tensor:
    """A tensor's place in a state that is sent without its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _map(kind: type, function: Callable, item):
    """The nested item with the function applied to all of a kind."""
    if isinstance(item, kind):
        return function(item)
    if isinstance(item, dict):
        return {key: _map(kind, function, value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_map(kind, function, value) for value in item)
    return item


def assert_replicas_equal(model: torch.nn.Module | dict[str, torch.Tensor]) -> None:
    """Checks that all workers hold the same bits. Costs a hash of the model, and a few bytes.

    Args:
        model: a module, whose state_dict is compared, but for the running statistics of its normalisation layers, which
            are of each worker's own batches; or a dict of tensors, all of which are compared.

    Raises:
        AssertionError: on every worker, naming the tensors that differ, and from which worker on.
    """
    statistics: set[str] = set()
    if isinstance(model, torch.nn.Module):
        tensors = model.state_dict()
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
        statistics = {f"{name}.{buffer}".lstrip(".") for name, layer in layers for buffer, _ in layer.named_buffers()}
    else:
        tensors = model
    mine = {
        name: _hash(tensor) for name, tensor in tensors.items() if torch.is_tensor(tensor) and name not in statistics
    }
    check_replicas(allgather_object(mine, name="replicas"), {}, "tensors")


def _hash(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()
