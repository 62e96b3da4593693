"""2:4 layers computed as such, for inference, by cuSPARSELt's kernels for semi-structured sparsity in PyTorch.

`torch.sparse.to_sparse_semi_structured` is a prototype in PyTorch: its interface may change, and it takes CUDA tensors
of certain sizes only. It compresses the weight here; the product is an operator of its own around what its tensor
calls, since PyTorch 2.11 compiles that tensor into passes over memory that its kernels do not need.
"""

import warnings
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from torch.utils.flop_counter import register_flop_formula

from models.sparse24 import Sparse24Linear
from stl import SettingError
from stl.precision import autocast_dtype

DTYPES = (torch.float16, torch.bfloat16)
ROWS = 8  # of which cuSPARSELt takes whole multiples, in these dtypes
DEFAULT = (0, 1, -1)  # cuSPARSELt's first algorithm, products not cut into several sums


@torch.library.custom_op("models::semi_structured_linear", mutates_args=())
def semi_structured_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, algorithm: list[int]
) -> Tensor:
    """x (n, k), contiguous, times a compressed weight (m, k), plus bias (m,): (n, m).

    `packed` has its bits as int16, of a weight in x's dtype; `algorithm` is what cuSPARSELt's search gives: an
    algorithm, into how many sums it cuts each, and how these are added.
    """
    rows = _filled(x)
    number, sums, adding = algorithm
    y = torch._cslt_sparse_mm(packed.view(x.dtype), rows.T, bias, None, None, True, number, sums, adding)
    return y[: len(x)]


@semi_structured_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, algorithm: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@register_flop_formula(torch.ops.models.semi_structured_linear)
def _(x: torch.Size, packed: torch.Size, bias: torch.Size | None, out_features: int, *_: object, **__: object) -> int:
    """Two FLOPs a MAC, and half of the dense layer's MACs."""
    return prod(x) * out_features


def _filled(x: Tensor) -> Tensor:
    """With zeros, to as many rows as the kernels take."""
    missing = max(-len(x) % ROWS, ROWS - len(x))
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class SemiStructuredLinear(nn.Module):
    """A linear layer, (..., k) → (..., m), with a compressed weight, for inference: no gradients. See `compress`.

    `packed` holds the bits of the weight, which is of `dtype` and stays so, `algorithm` what `search` found. With
    `macs` it is a `stl.flops.CountedLinear`. Raises SettingError for x of another dtype or number of features.
    """

    kind = Sparse24Linear.kind
    packed: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, packed.dtype
        self.algorithm = DEFAULT
        self.register_buffer("packed", packed.view(torch.int16))  # which no cast of the module's numbers touches
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        y = semi_structured_linear(self._rows(x), self.packed, self.bias, self.out_features, list(self.algorithm))
        return y.view(*x.shape[:-1], self.out_features)

    def search(self, x: Tensor) -> None:
        """Let cuSPARSELt search the fastest algorithm for an input of this shape, (..., k)."""
        rows = _filled(self._rows(x))
        given = (self.packed.view(self.dtype), rows.T, self.bias, None, None, True)
        self.algorithm = torch._C._cusparselt.mm_search(*given)[:3]  # type: ignore[attr-defined]

    def _rows(self, x: Tensor) -> Tensor:
        """Of all samples, (n, k), contiguous; in the weight's dtype under autocast."""
        if x.shape[-1:] != (self.in_features,):
            raise SettingError(
                f"x has shape {tuple(x.shape)}, but in_features={self.in_features} must be the last size"
            )
        if autocast_dtype(x) is not None:
            x = x.to(self.dtype)
        dtypes = {x.dtype, self.dtype if self.bias is None else self.bias.dtype}
        if dtypes != {self.dtype}:
            given = ", ".join(sorted(str(dtype) for dtype in dtypes - {self.dtype}))
            raise SettingError(f"the compressed weight is in {self.dtype}; x or bias in {given} must be so as well")
        return x.reshape(-1, self.in_features).contiguous()

    def get_extra_state(self) -> Tensor:
        """Nothing, in the weight's dtype, which its bits do not tell."""
        return torch.empty(0, dtype=self.dtype)

    def set_extra_state(self, state: Tensor) -> None:
        if state.dtype != self.dtype:
            raise SettingError(f"the checkpoint's compressed weight is in {state.dtype}, the model's in {self.dtype}")

    def macs(self, shape: Sequence[int]) -> int:
        return prod(shape[:-1]) * self.out_features * self.in_features // 2

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def compress(model: nn.Module) -> list[str]:
    """Put a `SemiStructuredLinear` in the place of every `Sparse24Linear`, in place, for inference.

    Returns the names of the layers.

    Raises:
        SettingError: a layer that is not on a GPU of compute capability 8.0 or more, not in float16 or bfloat16, or of
            sizes that the kernels do not take, that is the model itself, or a PyTorch without cuSPARSELt; the model is
            then unchanged.
    """
    if isinstance(model, Sparse24Linear):
        raise SettingError(
            "the model is a 2:4 layer itself, in whose place none can be put; give a module that holds it"
        )
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, Sparse24Linear)}
    compressed: dict[nn.Module, nn.Module] = {layer: _compressed(name, layer) for layer, name in layers.items()}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in compressed:
            model.set_submodule(name, compressed[layer])
    return list(layers.values())


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
        raise SettingError(
            f"layer {name!r} was not compressed for cuSPARSELt, which alone is used here; leave it dense"
        )
    return compressed.packed
