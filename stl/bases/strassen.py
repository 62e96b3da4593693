"""Strassen's algorithm (1969) and its Kronecker powers: exact, rank 7^s for tiles of 2^s."""

from functools import reduce

import torch

from stl.basis import Basis, register_basis

# One row a product; columns are the row-major entries (11, 12, 21, 22).
_X = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1]]
_W = [[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
_Y = [[1, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]

_RANKS = {2**s: 7**s for s in (1, 2, 3)}


@register_basis("strassen", ranks=lambda tile: [_RANKS[tile]] if tile in _RANKS else [])
def strassen(tile: int, rank: int) -> Basis:
    base = Basis("strassen", 2, 7, *(torch.tensor(m, dtype=torch.float64) for m in (_X, _W, _Y)))
    levels = tile.bit_length() - 1
    return reduce(lambda a, b: a.kron(b, name="strassen"), [base] * levels)
