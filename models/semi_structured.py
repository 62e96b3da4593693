"""2:4 layers computed as such, for inference, by cuSPARSELt's kernels for semi-structured sparsity in PyTorch.

`torch.sparse.to_sparse_semi_structured` is a prototype in PyTorch: its interface may change, and it takes CUDA tensors
of certain sizes only. It compresses the weight here; the product is an operator of its own around what its tensor
calls, since in compiled models PyTorch 2.11 takes that for a tensor of another layout, or transposes what comes out.
"""

import warnings
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from models.sparse24 import Sparse24Linear
from stl import SettingError

DTYPES = (torch.float16, torch.bfloat16)
ROWS = 8  # of which cuSPARSELt takes whole multiples, in these dtypes


@torch.library.custom_op("models::semi_structured_linear", mutates_args=())
def semi_structured_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, algorithm: int) -> Tensor:
    """x (n, k), contiguous, times a compressed weight (m, k), plus bias (m,): (n, m). `algorithm` is cuSPARSELt's."""
    return torch._cslt_sparse_mm(packed, x.T, bias, alg_id=algorithm, transpose_result=True)


@semi_structured_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, algorithm: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


class SemiStructuredLinear(nn.Module):
    """A linear layer, (..., k) → (..., m), with a compressed weight, for inference. See `compress`.

    `packed` holds the weight, `algorithm` the number of the algorithm, cuSPARSELt's first until one is searched. With
    `macs` it is a `stl.flops.CountedLinear`.
    """

    kind = Sparse24Linear.kind
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.algorithm = in_features, out_features, 0
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        y = semi_structured_linear(self._rows(x), self.packed, self.bias, self.out_features, self.algorithm)
        return y[: prod(x.shape[:-1])].view(*x.shape[:-1], self.out_features)

    def search(self, x: Tensor) -> None:
        """Let cuSPARSELt search the fastest algorithm for an input of this shape, (..., k)."""
        rows = self._rows(x)
        self.algorithm = torch._cslt_sparse_mm_search(self.packed, rows.T, self.bias, transpose_result=True)

    def _rows(self, x: Tensor) -> Tensor:
        """Of all samples, filled with zeros to as many as the kernels take; in the weight's dtype under autocast."""
        count = prod(x.shape[:-1])
        rows = x.reshape(count, self.in_features).contiguous()
        if torch.is_autocast_enabled(x.device.type):
            rows = rows.to(self.packed.dtype)
        missing = max(-count % ROWS, ROWS - count)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def macs(self, shape: Sequence[int]) -> int:
        return prod(shape[:-1]) * self.out_features * self.in_features // 2

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def compress(model: nn.Module) -> list[str]:
    """Put a `SemiStructuredLinear` in the place of every `Sparse24Linear`, in place, for inference.

    Returns the names of the layers.

    Raises:
        SettingError: a layer that is not on a GPU of compute capability 8.0 or more, not in float16 or bfloat16, or of
            sizes that the kernels do not take, or a PyTorch without cuSPARSELt; the model is then unchanged.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Sparse24Linear)}
    compressed = {name: _compressed(name, layer) for name, layer in layers.items()}
    for name, layer in compressed.items():
        model.set_submodule(name, layer)
    return list(compressed)


@torch.no_grad()
def _compressed(name: str, layer: Sparse24Linear) -> SemiStructuredLinear:
    packed = _packed(name, layer.pruned())
    bias = None if layer.bias is None else layer.bias.detach()
    return SemiStructuredLinear(layer.in_features, layer.out_features, packed, bias).train(layer.training)


def _packed(name: str, weight: Tensor) -> Tensor:
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise SettingError(
            f"layer {name!r} is on {weight.device}: kernels for 2:4 sparsity need a GPU of compute capability 8.0 or "
            "more; move the model there, or compute it densely as it is"
        )
    if weight.dtype not in DTYPES:
        raise SettingError(f"layer {name!r} is in {weight.dtype}: kernels for 2:4 sparsity need float16 or bfloat16")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype")
            compressed = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"layer {name!r} cannot be compressed ({reason}); leave it dense") from error
    if not isinstance(compressed, SparseSemiStructuredTensorCUSPARSELT) or compressed.packed is None:
        raise SettingError("this PyTorch has no cuSPARSELt for 2:4 sparsity; compute it densely as it is")
    return compressed.packed
