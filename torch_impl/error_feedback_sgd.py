"""The update of the PowerSGD paper's Algorithm 2."""

from typing import Any

import torch


class ErrorFeedbackSGD(torch.optim.Optimizer):
    """SGD with momentum as in the PowerSGD paper's Algorithm 2, lines 12 and 13, where it comes after the exchange:

        m = momentum * m + gradient
        x = x - lr * (gradient + m)

    Wrap it in hvd.DistributedOptimizer, whose exchange is lines 7 to 11. The first step moves 2 lr times the gradient,
    and a constant gradient in the end lr (1 + 1 / (1 - momentum)) times it: torch.optim.SGD with nesterov=True
    multiplies m by the momentum once more, and moves lr / (1 - momentum).

    Args:
        params: parameters, or groups of them.
        lr: learning rate, 0 or more.
        momentum: at least 0 and below 1.

    Raises:
        ValueError: lr or momentum is outside what is allowed.

    Example:
        >>> optimizer = hvd.ErrorFeedbackSGD(model.parameters(), lr=0.05)
        >>> optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=hvd.PowerSGD(rank=4))
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.9) -> None:
        if not lr >= 0:
            raise ValueError(f"ErrorFeedbackSGD: lr must be 0 or more, not {lr!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"ErrorFeedbackSGD: momentum must be at least 0 and below 1, not {momentum!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        """Takes one step; returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                p.add_(p.grad, alpha=-group["lr"]).add_(momentum, alpha=-group["lr"])
        return loss
