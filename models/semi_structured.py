"""2:4 layers computed as such, by PyTorch's kernels for semi-structured sparsity (CUTLASS or cuSPARSELt).

`torch.sparse.to_sparse_semi_structured` is a prototype in PyTorch: its interface may change, and it takes CUDA tensors
of certain sizes only.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sparse24 import Sparse24Linear
from stl import SettingError

DTYPES = (torch.float16, torch.bfloat16)


class SemiStructuredLinear(nn.Linear):
    """A linear layer with a compressed weight, for inference."""

    def forward(self, x: Tensor) -> Tensor:
        # of another layout F.linear makes products that a compressed weight does not know
        return F.linear(x.contiguous(), self.weight, self.bias)


def compress(model: nn.Module) -> list[str]:
    """Put a `SemiStructuredLinear` in the place of every `Sparse24Linear`, in place, for inference.

    Returns the names of the layers. Count MACs before: a compressed layer is counted as a dense one.

    Raises:
        SettingError: a layer that is not on a GPU of compute capability 8.0 or more, not in float16 or bfloat16, or of
            sizes that the kernels do not take; the model is then unchanged.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Sparse24Linear)}
    compressed = {name: _compressed(name, layer) for name, layer in layers.items()}
    for name, layer in compressed.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return list(compressed)


@torch.no_grad()
def _compressed(name: str, layer: Sparse24Linear) -> nn.Linear:
    weight = layer.pruned().detach()
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise SettingError(
            f"layer {name!r} is on {weight.device}: kernels for 2:4 sparsity need a GPU of compute capability 8.0 or "
            "more; move the model there, or compute it densely as it is"
        )
    if weight.dtype not in DTYPES:
        raise SettingError(f"layer {name!r} is in {weight.dtype}: kernels for 2:4 sparsity need float16 or bfloat16")
    made = SemiStructuredLinear(layer.in_features, layer.out_features, False, device="meta")
    made.bias = layer.bias  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype")
            compressed = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"layer {name!r} cannot be compressed ({reason}); leave it dense") from error
    made.weight = nn.Parameter(compressed, requires_grad=False)
    return made.requires_grad_(False).train(layer.training)
