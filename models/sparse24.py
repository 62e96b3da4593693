"""A rival of STL: a weight with two zeros in every four, trained with SR-STE.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.rival import RivalLinear
from stl import SettingError

GROUP = 4


class Sparse24Linear(RivalLinear):
    """A dense `weight` (m, k), of which every forward pass takes the two largest of four; see `two_of_four`.

    The gradient of the pruned weight goes straight to the dense one, and `decay` times what was pruned is added to it
    (SR-STE) in every backward pass: accumulated gradients have it as often as they are accumulated, and the loss scale
    of float16 does not enlarge it.

    The MACs are those of a kernel for 2:4 sparsity, half a dense layer's where there are whole groups; what is computed
    here is dense. Raises SettingError for a negative decay.
    """

    kind = "sparse24"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, decay: float = 2e-4) -> None:
        super().__init__(in_features, out_features, bias)
        if not 0 <= decay < float("inf"):
            raise SettingError(f"decay={decay} must be a number that is not negative")
        self.decay = decay
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def _draw(self, std: float) -> None:
        # The two largest of four hold most of the squares; their share is measured on the weight drawn.
        self.weight.normal_()
        kept = self.weight * two_of_four(self.weight)
        self.weight.mul_(std / kept.square().mean().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Pruned.apply(self.weight, self.decay), self.bias)

    def macs(self, shape: Sequence[int]) -> int:
        rest = self.in_features % GROUP
        return prod(shape[:-1]) * self.out_features * ((self.in_features - rest) // 2 + rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}"


def two_of_four(weight: Tensor) -> Tensor:
    """Where a weight (m, k) has the two largest magnitudes of four inputs in a row, of equal ones the earlier; bool.

    The last k mod 4 inputs, no whole group, are all kept.
    """
    rest = weight.shape[1] % GROUP
    size = weight[:, : weight.shape[1] - rest].unflatten(1, (weight.shape[1] // GROUP, GROUP)).abs()
    # Pairs of a group, which compile to one pass over the weight; topk and sort do not.
    one, other = size.unsqueeze(-1), size.unsqueeze(-2)
    earlier = torch.ones(GROUP, GROUP, dtype=torch.bool, device=weight.device).tril(-1)
    larger = (other > one) | ((other == one) & earlier)
    return F.pad((larger.sum(-1) < 2).flatten(1), (0, rest), value=True)


class _Pruned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, decay: float) -> Tensor:
        mask = two_of_four(weight)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] + ctx.decay * weight.masked_fill(mask, 0), None
