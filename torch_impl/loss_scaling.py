"""GradScaler, and optimizers that exchange gradients.

PyTorch's scaler looks at an optimizer's gradients, and divides them by the loss scale, in unscale_() or in step(). They
must be the averages then: so the exchange is completed first. Here it is told of the scale, too.
"""

import functools
from typing import Any

import torch


def synchronize_before_unscaling() -> None:
    """Lets GradScaler call `before_unscaling` and `unscaled` of the optimizers that have them."""
    scaler: Any = next(cls for cls in torch.cuda.amp.GradScaler.__mro__ if "_unscale_grads_" in vars(cls))
    original = scaler._unscale_grads_

    @functools.wraps(original)
    def unscale(self, optimizer, inv_scale, *args, **kwargs):
        exchanges = hasattr(optimizer, "before_unscaling")
        if exchanges:
            optimizer.before_unscaling(self)
        found = original(self, optimizer, inv_scale, *args, **kwargs)
        if exchanges:
            optimizer.unscaled(inv_scale)
        return found

    scaler._unscale_grads_ = unscale
