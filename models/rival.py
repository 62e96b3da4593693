"""What the rivals of STL share: sizes and bias, how they are drawn, and what they tell the count of MACs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from stl import SettingError


class RivalLinear(nn.Module, ABC):
    """Another layer in the place of a dense one, called like `torch.nn.Linear`: (..., k) → (..., m).

    A subclass registers its weights and draws them in `_draw`. `kind` is its name in counts and summaries; with `macs`
    it is a `stl.flops.CountedLinear`. `parameter_roles` names the roles of parameters that `models.optimizer` would
    take for others.

    Raises SettingError where a size is not positive.
    """

    kind: ClassVar[str]
    parameter_roles: ClassVar[dict[str, str]] = {}
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise SettingError(f"in_features={in_features} out_features={out_features} must both be positive")
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the weights so that the output has the variance of a dense layer drawn with this standard deviation.

        `std` defaults to that of `torch.nn.Linear`, √(1/3k). The bias goes to zero.
        """
        self._draw((1 / (3 * self.in_features)) ** 0.5 if std is None else std)
        if self.bias is not None:
            self.bias.zero_()

    @abstractmethod
    def _draw(self, std: float) -> None:
        """Draw all but the bias; without gradients."""

    @abstractmethod
    def macs(self, shape: Sequence[int]) -> int:
        """MACs of a forward pass on an input of this shape (..., k)."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def row_budget(in_features: int, out_features: int, factor: float) -> float:
    """MACs of one row, `factor` times fewer than a dense layer's.

    Raises SettingError for a factor below 1.
    """
    if not 1 <= factor < float("inf"):
        raise SettingError(f"factor={factor} must be a number from 1 on: dense MACs / MACs")
    return in_features * out_features / factor
