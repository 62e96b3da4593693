"""A normalisation and the STL layer behind it as one module.

With kernels what is normalised never reaches memory, but before narrow layers: its encoding is computed from x at once.
"""

from torch import Tensor, nn

from stl.errors import SettingError
from stl.linear import STLLinear, check_is_stl
from stl.normalisation import Norm


class STLNormLinear(nn.Module):
    """norm → linear, (..., n, k) → (..., n, m), for a `torch.nn.LayerNorm` or `torch.nn.RMSNorm` over the k features.

    The numbers are those of one after the other. The attribute `backend` is that of the layer; kernels take up to
    `stl.kernels.MOST_NORMALISED_TILES` in a row; wider ones, and narrow ones, are computed one after the other.
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
        return linear(x, None, parts) if linear.normalises(parts, x) else linear(norm(x))

    @property
    def backend(self) -> str:
        return self.linear.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.linear.backend = backend
