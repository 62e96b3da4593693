"""A rival of STL: a weight of low rank."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.rival import RivalLinear, row_budget


class LowRankLinear(RivalLinear):
    """W = `outer` (m, r) · `inner` (r, k), multiplied one after the other.

    The rank r is the largest that costs at most 1/`factor` of the dense layer's MACs, and at least 1.
    Raises SettingError for a factor below 1.
    """

    kind = "low_rank"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, factor: float = 2.667) -> None:
        super().__init__(in_features, out_features, bias)
        budget = row_budget(in_features, out_features, factor)
        self.rank = max(1, int(budget // (in_features + out_features)))
        self.inner = nn.Parameter(torch.empty(self.rank, in_features))
        self.outer = nn.Parameter(torch.empty(out_features, self.rank))
        self.reset_parameters()

    def _draw(self, std: float) -> None:
        # An entry of W sums r products; both factors begin, and take steps, of one size.
        for factor in (self.inner, self.outer):
            factor.normal_(std=(std**2 / self.rank) ** 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.inner), self.outer, self.bias)

    def macs(self, shape: Sequence[int]) -> int:
        return prod(shape[:-1]) * self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
