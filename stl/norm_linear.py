"""A normalisation and the STL layer behind it as one module.

With kernels what is normalised never reaches memory: its encoding is computed from x at once.
"""

import torch
from torch import Tensor, nn

from stl import kernels
from stl.errors import SettingError
from stl.functional import check_arguments
from stl.linear import STLLinear


class STLNormLinear(nn.Module):
    """norm → linear, (..., n, k) → (..., n, m), for a `torch.nn.LayerNorm` or `torch.nn.RMSNorm` over the k features.

    The numbers are those of one after the other. The attribute `backend`, "auto", says what computes it, as in
    `stl_linear`; kernels take up to 256 tiles in a row of tiles, wider layers are computed one after the other.
    Raises SettingError for another normalisation.
    """

    backend = "auto"

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm, linear: STLLinear) -> None:
        super().__init__()
        if type(norm) not in (nn.LayerNorm, nn.RMSNorm) or norm.weight is None:
            raise SettingError(f"{norm} must be a LayerNorm or an RMSNorm with weights")
        if tuple(norm.normalized_shape) != (linear.in_features,):
            raise SettingError(f"{norm} must normalise the {linear.in_features} features that {linear} takes")
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        wide = linear.weight.shape[1] > kernels.MOST_NORMALISED_TILES
        if wide or not kernels.use_triton(self.backend, x, linear.tile, linear.rank):
            return linear(self.norm(x))
        from stl.kernels.norm import norm_linear  # needs triton

        rows = linear.with_rows(x)
        layer = (linear.weight, linear.encoder, linear.decoder, linear.bias)
        check_arguments(rows, *layer, linear.row_axis, linear.out_features, self.backend)
        shift = getattr(self.norm, "bias", None)
        eps = torch.finfo(x.dtype).eps if self.norm.eps is None else self.norm.eps  # RMSNorm's default
        centre = isinstance(self.norm, nn.LayerNorm)
        y = norm_linear(rows, self.norm.weight, shift, eps, centre, layer, linear.row_axis, linear.out_features)
        return y.view(*x.shape[:-1], linear.out_features)
