"""A normalisation as what it computes with."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from stl.precision import autocast_dtype


class Norm(NamedTuple):
    """LayerNorm, (x − μ)/σ·gain + shift over the last axis, or RMSNorm, x/√(mean x²)·gain, where not `centre`.

    Without `eps`, as in `torch.nn.RMSNorm`, it is that of the dtype PyTorch computes in: float32 for 16-bit numbers.
    """

    gain: Tensor
    shift: Tensor | None
    eps: float | None
    centre: bool

    def apply(self, x: Tensor) -> Tensor:
        """(..., k) → the same."""
        if self.centre:
            assert self.eps is not None
            return F.layer_norm(x, self.gain.shape, self.gain, self.shift, self.eps)
        return F.rms_norm(x, self.gain.shape, self.gain, self.eps)

    def goes_with(self, x: Tensor) -> bool:
        """Whether kernels may apply it to x; what does not go together is PyTorch's to refuse."""
        numbers = [self.gain, *([] if self.shift is None else [self.shift])]
        alike = autocast_dtype(x) is not None or all(tensor.dtype == x.dtype for tensor in numbers)
        return alike and all(tensor.device == x.device and tensor.shape == x.shape[-1:] for tensor in numbers)
