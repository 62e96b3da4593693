"""Causal bases: a token of a tile depends on tokens up to itself, for every encoded weight; any rank from t to t³.

Every channel q has a pivot row p(q): its encoder reads rows ≤ p only and its decoder writes rows ≥ p only. What token i
gives to itself then passes through the channels of pivot i alone, which together are r/t matrices of the t² that a row
of X times W needs. Summed over the rows, **no causal basis has an error below 1 − r/t³**, that of keeping r of the
scalar products, which are causal themselves.

Encoder and decoder of channel (p, a, b) are read_p ⊗ feature_a and write_p ⊗ feature_b: tokens ⊗ features as in
`hadamard`. An orthonormal encoder and decoder would have to be block diagonal, for a triangular orthogonal matrix is
diagonal: tokens would then not meet at all. Instead the token part is that of linear prediction. Let R_ij = ρ^|i−j| be
the correlation of a first-order autoregressive process and R = W·Wᵀ its Cholesky factorisation. Column p of the lower
triangular W is write_p, and row p of W⁻¹ is read_p, scaled to norm 1: token p less ρ times the one before it, so that
tokens of that correlation have uncorrelated channels. Three things follow:

- Rows of W have norm 1, and so have all read_p and feature_a: with i.i.d. encoded weights every row of the output has
  the same variance. Where the pivots have not equally many channels, the decoder is scaled to keep that.
- W·W⁻¹ = I: where all pivots have the same pairs (a, b), the least-squares encode_w undoes the mixing, and the error is
  the least there is, 1 − r/t³. Where t does not divide r, it is at most .03 above.
- ρ bounds how far from orthonormal it is: the singular values of W lie between √((1−ρ)/(1+ρ)) and its inverse, and
  those of the reading part between (1−ρ)/√(1+ρ²) and (1+ρ)/√(1+ρ²), whatever t.

At rank t³ it is the scalar products themselves, which are exact.
"""

import torch
from torch import Tensor

from stl.bases.frame import orthonormal_transform
from stl.bases.products import products
from stl.basis import Basis, least_squares_encode_w, register_basis

CORRELATION = 0.5


def predictor(tile: int, correlation: float) -> tuple[Tensor, Tensor]:
    """read and write, (t, t) float64, pivots × rows: lower and upper triangular, see the module."""
    rows = torch.arange(tile)
    steps = (rows - rows[:, None]).clamp_min(0)
    innovation = torch.where(rows == 0, 1.0, (1 - correlation**2) ** 0.5).double()
    write = (correlation ** steps.double()).triu() * innovation[:, None]
    read = torch.eye(tile, dtype=torch.float64)
    read[rows[1:], rows[:-1]] = -correlation
    return read / read.norm(dim=1, keepdim=True), write


@register_basis("causal", ranks=lambda tile: range(tile, tile**3 + 1))
def causal(tile: int, rank: int) -> Basis:
    if rank == tile**3:
        plain = products(tile, rank)
        return Basis("causal", tile, rank, plain.encode_x, plain.encode_w, plain.decode)
    read, write = predictor(tile, CORRELATION)
    features = orthonormal_transform(tile)
    encode_x, decode = [], []
    for pivot in range(tile):
        count = (pivot + 1) * rank // tile - pivot * rank // tile
        scale = (tile**3 / (rank * count)) ** 0.5
        for n in range(count):
            shift, feature = divmod(n, tile)
            encode_x.append(torch.kron(read[pivot], features[feature]))
            decode.append(torch.kron(write[pivot], features[(feature + shift) % tile]) * scale)
    x, y = torch.stack(encode_x), torch.stack(decode)
    return Basis("causal", tile, rank, x, least_squares_encode_w(x, y), y)
