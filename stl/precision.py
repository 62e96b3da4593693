"""The dtype that an operator computes in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns x to at this moment; None outside of autocast, and for float64, which it leaves alone."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """No autocast where x is; of meta tensors it knows nothing."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
