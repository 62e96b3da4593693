"""A normalisation and the STL layer behind it as one module.

With kernels what is normalised never reaches memory: its encoding is computed from x at once.
"""

from torch import Tensor, nn

from stl import kernels
from stl.errors import SettingError
from stl.functional import check_arguments
from stl.linear import STLLinear, check_is_stl
from stl.normalisation import Norm
from stl.precision import autocast_dtype


class STLNormLinear(nn.Module):
    """norm → linear, (..., n, k) → (..., n, m), for a `torch.nn.LayerNorm` or `torch.nn.RMSNorm` over the k features.

    The numbers are those of one after the other. The attribute `backend` is that of the layer; kernels take up to
    `stl.kernels.MOST_NORMALISED_TILES` tiles in a row of tiles, and wider layers are computed one after the other.
    Raises SettingError for another normalisation or layer.
    """

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm, linear: STLLinear) -> None:
        super().__init__()
        check_is_stl(linear)
        if type(norm) not in (nn.LayerNorm, nn.RMSNorm) or norm.weight is None:
            raise SettingError(f"{norm} must be a LayerNorm or an RMSNorm with weights")
        if tuple(norm.normalized_shape) != (linear.in_features,):
            raise SettingError(f"{norm} must normalise the {linear.in_features} features that {linear} takes")
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        linear, norm = self.linear, self.norm
        parts = Norm(norm.weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, nn.LayerNorm))
        if fits(linear) and goes_with(parts, x) and linear.uses_kernels(x):
            return norm_linear(parts, linear, x, None)
        return linear(norm(x))

    @property
    def backend(self) -> str:
        return self.linear.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.linear.backend = backend


def fits(linear: STLLinear) -> bool:
    """Whether a program of the kernels can hold a row of tiles, and so normalise it."""
    return -(-linear.in_features // linear.tile) <= kernels.MOST_NORMALISED_TILES.get(linear.tile, 0)


def goes_with(norm: Norm, x: Tensor) -> bool:
    """Whether kernels may apply the norm to x; what does not go together is PyTorch's to refuse."""
    numbers = [norm.gain, *([] if norm.shift is None else [norm.shift])]
    alike = autocast_dtype(x) is not None or all(tensor.dtype == x.dtype for tensor in numbers)
    return alike and all(tensor.device == x.device for tensor in numbers)


def norm_linear(norm: Norm, linear: STLLinear, x: Tensor, residual: Tensor | None) -> Tensor:
    """linear(norm(x)) + residual by kernels, for a layer that fits."""
    from stl.kernels.norm import norm_linear  # needs triton

    rows, layer = linear.with_rows(x), linear.tensors()
    check_arguments(rows, *layer, linear.row_axis, linear.out_features)
    residual = linear.with_rows_of(x, residual)
    y = norm_linear(rows, norm, layer, linear.row_axis, linear.out_features, residual)
    return y.view(*x.shape[:-1], linear.out_features)
