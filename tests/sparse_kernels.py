"""PyTorch's kernels for 2:4 sparsity on a CPU, where their weight is not compressed and the product is dense."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from models import semi_structured

FOUND = (7, 2, 1)  # the algorithm that the search finds


def emulate(monkeypatch) -> list[tuple[tuple[int, ...], ...]]:
    """From here on weights on a CPU are compressed; returns what will be searched, shapes of weight and input."""
    searched = []

    def search(packed: Tensor, x: Tensor, bias: Tensor | None, *how: Any) -> tuple[int, ...]:
        assert packed.dtype == x.dtype
        assert how == (None, None, True)
        searched.append((tuple(packed.shape), tuple(x.shape)))
        return *FOUND, 9

    def product(packed: Tensor, x: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        assert packed.dtype == x.dtype
        assert bias is None or bias.dtype == x.dtype
        assert how == (None, None, True, *FOUND)
        assert x.shape[1] % semi_structured.ROWS == 0 < x.shape[1]
        y = x.T @ packed.T
        return y if bias is None else y + bias

    monkeypatch.setattr(semi_structured, "_packed", lambda name, weight: weight.clone())
    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=search), raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    return searched
