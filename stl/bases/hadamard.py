"""Walsh–Hadamard over tokens ⊗ features: the characters of Z₂^(2·log₂t), orthonormal, rank t²."""

import torch

from stl.basis import Basis, least_squares_encode_w, register_basis


def walsh_hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh–Hadamard matrix of Sylvester's order, float64, for `size` a power of two."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix / size**0.5


@register_basis("hadamard", ranks=lambda tile: [tile**2] if tile.bit_count() == 1 else [])
def hadamard(tile: int, rank: int) -> Basis:
    transform = torch.kron(walsh_hadamard(tile), walsh_hadamard(tile))
    return Basis("hadamard", tile, rank, transform, least_squares_encode_w(transform, transform), transform)
