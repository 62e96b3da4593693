"""The weight of an STL layer as a function of a dense one, which is what is then trained."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, remove_parametrizations

from stl.basis import Basis
from stl.functional import encode_weight


class EncodedWeight(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`): a dense weight (k, m) → it encoded, (r, ⌈k/t⌉, ⌈m/t⌉).

    An encoded weight has r numbers where a dense one has t², so that a step of training leads away from those that
    encode a dense one. As a function of it, what an exact basis computes stays a matrix product, and what it learns is
    what a dense layer learns.
    """

    encode_w: Tensor  # (r, t²)

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.register_buffer("encode_w", basis.encode_w.clone(), persistent=False)  # from the basis, not from files

    def forward(self, dense: Tensor) -> Tensor:
        with torch.autocast(dense.device.type, enabled=False):  # rounded once, behind it
            return encode_weight(dense, self.encode_w.to(dense))


def encode_weights(model: nn.Module) -> list[str]:
    """Leave encoded weights in the place of the dense ones that STL layers of `model` train, in place, as inference
    wants them. Returns the names of these layers; they then are as with `train_weight="encoded"`."""
    found = {
        name: module
        for name, module in model.named_modules()
        for trained in [getattr(module, "parametrizations", {})]
        if "weight" in trained and _encodes(trained["weight"])
    }
    for module in found.values():
        remove_parametrizations(module, "weight")
    return list(found)


def _encodes(parametrization: ParametrizationList) -> bool:
    return any(isinstance(step, EncodedWeight) for step in parametrization)
