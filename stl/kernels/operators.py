"""What the operators have in common: how they are declared, how they take samples, and what their gradients and costs
are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stl.errors import SettingError

Layer = tuple[Tensor, Tensor, Tensor, Tensor | None]  # weight, encoder, decoder, bias


def operator(name: str) -> Callable[[Callable[..., object]], Any]:
    """Makes a function `torch.ops.stl.<name>`, which must take tensors of any strides. Compiled code then hands on what
    it has; without the tag, it copies arguments into the strides that they have in a call that is not compiled."""
    return torch.library.custom_op(f"stl::{name}", mutates_args=(), tags=(torch.Tag.flexible_layout,))


def as_samples(x: Tensor, row_axis: str) -> tuple[Tensor, bool]:
    """x with three axes, and whether the rows of tiles run along the first: (B, n, k) or, so, (n, B, k)."""
    if row_axis == "batch":
        return (x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)), True
    return (x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)), False


def features_last(x: Tensor) -> Tensor:
    """x, or a copy of it where its features are apart in memory, as T2T-ViT's soft splits leave them: a copy takes no
    longer than to read it so once, and a layer that is trained reads it twice."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def added(residual: Tensor | None, row_axis: str) -> Tensor | None:
    """As the operators take it; autocast leaves it as precise as it is."""
    return None if residual is None else as_samples(residual, row_axis)[0]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A bias, what a norm multiplies with or adds, or channels, as kernels read them."""
    return None if tensor is None else tensor.contiguous()


def tile_of(matrix: Tensor) -> int:
    """t of an encoder or decoder (r, t²)."""
    return round(matrix.shape[1] ** 0.5)


def sample_view(x: Tensor, rows_first: bool) -> Tensor:
    """As (B, n, k)."""
    return x.transpose(0, 1) if rows_first else x


def only_once(*_: Any) -> None:
    """The gradient of the operator of a backward pass."""
    raise SettingError("the kernels have no gradients of gradients; use backend='torch'")


def sum_dtype(of: Tensor, residual: Tensor | None) -> torch.dtype:
    """Of what is computed from `of`, with the residual added."""
    return of.dtype if residual is None else torch.promote_types(of.dtype, residual.dtype)


def wanted(gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of the gradients that an operator computes, those that are asked for."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=False))


def encode_gemm_macs(P: int, weight: Any, encoder: Any) -> tuple[int, int]:
    """Of the encode and of the batched GEMM, from shapes and the number of rows of tiles."""
    rank, K, M = weight
    return P * K * encoder[1] * rank, P * K * M * rank


def rows_of_tiles(shape: Any, tile: int, rows_first: bool) -> int:
    rows, samples = shape[:2] if rows_first else (shape[1], shape[0])
    return samples * -(-rows // tile)
