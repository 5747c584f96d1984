"""GradScaler, and optimizers that exchange gradients.

PyTorch's scaler looks at an optimizer's gradients, and divides them by the loss scale, in unscale_() or in step(). They
must be the averages then: so the exchange is completed first. Here it is told of the scale, too.
"""

import functools

import torch


def synchronize_before_unscaling() -> None:
    """Lets GradScaler call `before_unscaling` of the optimizers that have it."""
    scaler = next(cls for cls in torch.cuda.amp.GradScaler.__mro__ if "_unscale_grads_" in vars(cls))
    original = scaler._unscale_grads_

    @functools.wraps(original)
    def unscale(self, optimizer, *args, **kwargs):
        if hasattr(optimizer, "before_unscaling"):
            optimizer.before_unscaling(self)
        return original(self, optimizer, *args, **kwargs)

    scaler._unscale_grads_ = unscale
