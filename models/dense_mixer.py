"""A control for STL, whose tiles mix tokens: a dense layer that mixes them too, and saves nothing."""

from collections.abc import Sequence
from math import ceil, prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.rival import RivalLinear
from stl import SettingError

WINDOWS = ("blocks", "sliding")


class MixingLinear(RivalLinear):
    """y = W·(x + mix(x)) + b: a depthwise convolution along the tokens, axis −2 of (..., n, k), before a dense layer.

    - `window="blocks"`: `kernel_size` neighbours see each other, every place in the block with a kernel of its own, as
      tokens do in an STL tile; the last block is filled with zeros.
    - `window="sliding"`: each token sees the `kernel_size` ones around it, of an even number one more behind it than
      before, and zeros beyond the ends ("same" padding).

    Nothing passes between samples: of a 2-D input each row is one token, alone in its sample. The kernel starts at
    zero, so that the layer begins as the dense one. Raises SettingError for an unknown window or an empty kernel.
    """

    kind = "dense_mixer"
    # The kernel has the part that encoders and decoders have in STL, and like them no weight decay, which would hold it
    # to the dense layer: the control is to find out what mixing gives.
    parameter_roles: ClassVar = {"kernel": "basis"}

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, kernel_size: int = 4, window: str = "blocks"
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if window not in WINDOWS:
            raise SettingError(f"window={window!r} is unknown; choose one of {', '.join(WINDOWS)}")
        if kernel_size < 1:
            raise SettingError(f"kernel_size={kernel_size} must be positive")
        self.kernel_size, self.window = kernel_size, window
        self.stride = kernel_size if window == "blocks" else 1
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.kernel = nn.Parameter(torch.empty(in_features * self.stride, 1, kernel_size))
        self.reset_parameters()

    def _draw(self, std: float) -> None:
        self.weight.normal_(std=std)
        self.kernel.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + self._mix(x), self.weight, self.bias)

    def _mix(self, x: Tensor) -> Tensor:
        tokens, channels, size = _tokens(x.shape), self.in_features, self.kernel_size
        padding = (0, -tokens % size) if self.window == "blocks" else ((size - 1) // 2, size // 2)
        y = F.pad(x.reshape(-1, tokens, channels).mT, padding)
        y = F.conv1d(y, self.kernel, stride=self.stride, groups=channels)  # (samples, channels · stride, blocks)
        y = y.unflatten(1, (channels, self.stride)).mT.flatten(2)[..., :tokens]
        return y.mT.reshape(x.shape)

    def macs(self, shape: Sequence[int]) -> int:
        rows, tokens = prod(shape[:-1]), _tokens(shape)
        mixed = rows // tokens * ceil(tokens / self.stride) * self.stride
        return mixed * self.in_features * self.kernel_size + rows * self.in_features * self.out_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, window={self.window!r}"


def _tokens(shape: Sequence[int]) -> int:
    return shape[-2] if len(shape) > 2 else 1
