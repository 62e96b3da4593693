"""A rival of STL: a weight with two zeros in every four, trained with SR-STE.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.
Which two is by magnitude, or by that times the size of the input: Sun et al., "A Simple and Effective Pruning Approach
for Large Language Models", ICLR 2024, arXiv 2306.11695 (Wanda).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.rival import RivalLinear
from stl import SettingError

GROUP = 4
PRUNINGS = ("magnitude", "wanda")


class Sparse24Linear(RivalLinear):
    """A dense `weight` (m, k), of which every forward pass takes the two largest of four; see `two_of_four`.

    With pruning="wanda" those with the largest |weight|·`input_norm` (k,), ‖x_j‖₂ of each input over a calibration
    set, equation (1) of Wanda. In training the two follow the weight; `input_norm` stays.

    The gradient of the pruned weight goes straight to the dense one, and `decay` times what was pruned is added to it
    (SR-STE) in every backward pass: accumulated gradients have it as often as they are accumulated, and the loss scale
    of float16 does not enlarge it. With `fixed_mask` the two are chosen once, when the weight is drawn or loaded: the
    others are 0 from then on, and have no gradient and no decay.

    The MACs are those of a kernel for 2:4 sparsity, half a dense layer's where there are whole groups; what is computed
    here is dense; `models.semi_structured` has it computed sparsely. Raises SettingError for a negative decay, or an
    unknown pruning.
    """

    kind = "sparse24"
    input_norm: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        decay: float = 2e-4,
        pruning: str = "magnitude",
        fixed_mask: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if not 0 <= decay < float("inf"):
            raise SettingError(f"decay={decay} must be a number that is not negative")
        if pruning not in PRUNINGS:
            raise SettingError(f"pruning={pruning!r} is unknown; choose one of {', '.join(PRUNINGS)}")
        if not isinstance(fixed_mask, bool):
            raise SettingError(f"fixed_mask={fixed_mask!r} must be true or false")
        self.decay, self.pruning, self.fixed_mask = decay, pruning, fixed_mask
        self.register_buffer("input_norm", torch.ones(in_features) if pruning == "wanda" else None)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def _draw(self, std: float) -> None:
        # The two largest of four hold most of the squares; their share is measured on the weight drawn.
        self.weight.normal_()
        kept = self.weight * two_of_four(self.weight)
        self.weight.mul_(std / kept.square().mean().sqrt())
        self._fix_mask()

    @torch.no_grad()
    def load_dense(self, weight: Tensor, bias: Tensor | None = None, input_norm: Tensor | None = None) -> None:
        """Start from a dense layer, weight (m, k) and bias (m,), and for Wanda from the sizes (k,) of its inputs.

        Raises SettingError where these are given and not asked for, or the other way round.
        """
        if (input_norm is None) != (self.input_norm is None):
            if self.input_norm is None:
                raise SettingError("pruning='magnitude' needs no calibration data; leave it out, or set pruning=wanda")
            raise SettingError("pruning='wanda' needs calibration data; give some, or set pruning=magnitude")
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        if self.input_norm is not None and input_norm is not None:
            self.input_norm.copy_(input_norm)
        self._fix_mask()

    def _fix_mask(self) -> None:
        """Zeros without a gradient stay the two smallest of four."""
        if self.fixed_mask:
            self.weight.copy_(self.pruned())

    def pruned(self) -> Tensor:
        """What it multiplies with, (m, k)."""
        return _Pruned.apply(self.weight, self.input_norm, None if self.fixed_mask else self.decay)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.pruned(), self.bias)

    def macs(self, shape: Sequence[int]) -> int:
        rest = self.in_features % GROUP
        return prod(shape[:-1]) * self.out_features * ((self.in_features - rest) // 2 + rest)

    def extra_repr(self) -> str:
        own = f"decay={self.decay}, pruning={self.pruning!r}, fixed_mask={self.fixed_mask}"
        return f"{super().extra_repr()}, {own}"


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
    def forward(ctx: Any, weight: Tensor, input_norm: Tensor | None, decay: float | None) -> Tensor:
        """The weight with two zeros in every four; a decay of None passes no gradient to what is pruned."""
        mask = two_of_four(weight if input_norm is None else weight * input_norm)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        if ctx.decay is None:
            return gradients[0].masked_fill(~mask, 0), None, None
        return gradients[0] + ctx.decay * weight.masked_fill(mask, 0), None, None


@torch.no_grad()
def input_norms(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """‖x_j‖₂ (k,) of every input j of these layers of the model, by name, over all rows of all batches.

    In one pass over the dense model, where Wanda prunes block by block and takes the inputs that pruned blocks give.
    """
    squares: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            own = args[0].flatten(0, -2).float().square().sum(0)
            squares[name] = squares[name] + own if name in squares else own

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    training = model.training
    try:
        model.eval()
        device = next(model.parameters()).device
        for batch in batches:
            model(batch.to(device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: own.sqrt() for name, own in squares.items()}
