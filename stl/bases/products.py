"""r of the t³ scalar products of plain matrix multiplication: the yardstick that bases must beat (error 1 − r/t³)."""

import torch

from stl.basis import Basis, register_basis


@register_basis("products", ranks=lambda tile: range(1, tile**3 + 1))
def products(tile: int, rank: int) -> Basis:
    # Taken one diagonal (k − i − j) mod t after the other, so that every output entry gets as many as any other.
    kept = [(i, (i + j + s) % tile, j) for s in range(tile) for i in range(tile) for j in range(tile)][:rank]
    eye = torch.eye(tile**2, dtype=torch.float64)
    encode_x = eye[[i * tile + k for i, k, _ in kept]]
    encode_w = eye[[k * tile + j for _, k, j in kept]]
    return Basis("products", tile, rank, encode_x, encode_w, eye[[i * tile + j for i, _, j in kept]])
