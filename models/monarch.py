"""A rival of STL: Monarch matrices, two block-diagonal factors with permutations.

Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022, arXiv 2204.00595.
"""

from collections.abc import Sequence
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.rival import RivalLinear, row_budget


class MonarchLinear(RivalLinear):
    """W = P·L·P'·R: R = `first` (b, s, p) and L = `second` (b, q, s) hold the b blocks on the diagonals.

    p = ⌈k/b⌉ and q = ⌈m/b⌉, where inputs are padded with zeros and outputs cut off, and s = min(p, q). P' and P read a
    (b, s) and a (b, q) matrix column by column, so that a block of L sees min(b, s) blocks of R. The number of blocks b
    is the smallest that costs at most 1/`factor` of the dense layer's MACs, padding counted; of a layer too narrow for
    any, the cheapest.

    Raises SettingError for a factor below 1.
    """

    kind = "monarch"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, factor: float = 2.667) -> None:
        super().__init__(in_features, out_features, bias)
        budget = row_budget(in_features, out_features, factor)
        choices = range(1, max(in_features, out_features) + 1)
        fitting = (blocks for blocks in choices if self._row_macs(blocks) <= budget)
        self.blocks = next(fitting, None) or min(choices, key=self._row_macs)
        p, s, q = self._block_sizes(self.blocks)
        self.first = nn.Parameter(torch.empty(self.blocks, s, p))
        self.second = nn.Parameter(torch.empty(self.blocks, q, s))
        self.reset_parameters()

    def _block_sizes(self, blocks: int) -> tuple[int, int, int]:
        p, q = ceil(self.in_features / blocks), ceil(self.out_features / blocks)
        return p, min(p, q), q

    def _row_macs(self, blocks: int) -> int:
        p, s, q = self._block_sizes(blocks)
        return blocks * s * (p + q)

    def _draw(self, std: float) -> None:
        # An output sums s values, and each of those k/b inputs that are no padding, on average.
        for factor in (self.first, self.second):
            factor.normal_(std=(std**2 * self.blocks / self.second.shape[2]) ** 0.25)

    def forward(self, x: Tensor) -> Tensor:
        blocks, s, p = self.first.shape
        rows = F.pad(x.reshape(-1, self.in_features), (0, blocks * p - self.in_features))
        hidden = rows.view(-1, blocks, p).transpose(0, 1) @ self.first.mT  # (b, rows, s)
        hidden = hidden.permute(1, 2, 0).reshape(-1, blocks, s).transpose(0, 1) @ self.second.mT  # (b, rows, q)
        y = hidden.permute(1, 2, 0).flatten(1)[:, : self.out_features]
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def macs(self, shape: Sequence[int]) -> int:
        return prod(shape[:-1]) * self._row_macs(self.blocks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"
