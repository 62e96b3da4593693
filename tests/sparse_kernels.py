"""PyTorch's kernels for 2:4 sparsity on a CPU: the tensor, and what it does not know, are PyTorch's own; the product is
dense."""

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from models import semi_structured

FOUND = 7  # the algorithm that the search finds
SIZES = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS


class Emulated(SparseSemiStructuredTensorCUSPARSELT):
    _DTYPE_SHAPE_CONSTRAINTS = SIZES | {torch.float32: SIZES[torch.bfloat16]}

    @classmethod
    def from_dense(cls, weight: Tensor) -> "Emulated":
        return cls(weight.shape, weight.clone(), None, None, None, None)

    def _mm(self, B: Tensor, *, bias: Tensor | None = None, **kwargs) -> Tensor:
        assert B.dtype == self.dtype
        assert bias is None or bias.dtype == self.dtype
        assert self.alg_id_cusparselt == FOUND
        product = self.packed @ B
        product = product if bias is None else product + bias[:, None]
        return product.T.contiguous().T if self.fuse_transpose_cusparselt else product


def emulate(monkeypatch) -> list[tuple[tuple[int, ...], ...]]:
    """From here on weights on a CPU are compressed; returns what will be searched, shapes of weight and input."""
    searched = []

    def compressed(name, layer):
        made = semi_structured.SemiStructuredLinear(layer.in_features, layer.out_features, False, device="meta")
        made.bias = layer.bias
        made.weight = nn.Parameter(Emulated.from_dense(layer.pruned().detach()), requires_grad=False)
        return made.requires_grad_(False).train(layer.training)

    def search(weight, x, bias, transpose_result):
        assert weight.dtype == x.dtype
        searched.append((tuple(weight.shape), tuple(x.shape)))
        return FOUND

    monkeypatch.setattr(SparseSemiStructuredTensorCUSPARSELT, "_PROTOTYPE_WARNING_SHOWN", True)
    SparseSemiStructuredTensorCUSPARSELT._load_dispatch_table()
    monkeypatch.setattr(semi_structured, "_compressed", compressed)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    return searched
