"""A normalisation as what it computes with."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


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
