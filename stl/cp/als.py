"""Batched alternating least squares (ALS) for the matrix-multiplication tensor, with a penalty on S.

The tensor is taken in its cyclic form, trace(A·B·C) (so that C is the transpose of a decoder tile): then one formula
updates all three factors. `Factors` is a list of three float64 tensors of shape (starts, rank, t²): side by side in the
batch stand independent starts, and row q of each factor is column q of the CP decomposition (Kolda, Bader, "Tensor
decompositions and applications", SIAM Review 2009).

With U and V fixed, the error is quadratic in W, with the normal matrix (U·Uᵀ) ∘ (V·Vᵀ), the Gram matrix of the
Khatri–Rao product of U and V. The penalty λ·Σ_q |u_q|²·|v_q|²·|w_q|² = λ·t³·S adds λ times its diagonal: a ridge
weighted by the diagonal is a penalty on S. With u_q and v_q scaled to norm 1, which changes neither error nor S, the
diagonal is 1.
"""

from functools import cache
from math import isqrt

import torch
from torch import Tensor

from stl.basis import Basis, matmul_tensor

Factors = list[Tensor]

CHECK_EVERY = 10  # sweeps between two looks at S
RIDGE_MIN, RIDGE_MAX = 1e-12, 0.1  # below, a normal matrix may be singular; above, ALS ends in plain scalar products
RIDGE_DOWN, RIDGE_UP = 0.8, 1.5  # factors on the ridge where S is within its limit, and above it
SLACK = 1e-6  # relative, of the limit on S: for what rounding the factors to decimals changes
TINY = 1e-150  # the norm that stands for zero


def unit_rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=-1, keepdim=True).clamp_min(TINY)


def balance(factors: Factors) -> Factors:
    """The same decomposition with the three vectors of every column equally long."""
    norms = [f.norm(dim=-1, keepdim=True).clamp_min(TINY) for f in factors]
    mean = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    return [f / norm * mean for f, norm in zip(factors, norms, strict=True)]


def contract(v: Tensor, w: Tensor) -> Tensor:
    """The tensor times v_q and w_q for every q: vec((V_q·W_q)ᵀ), shapes (…, rank, t²)."""
    t = isqrt(v.shape[-1])
    tiles = (*v.shape[:-1], t, t)
    return (v.reshape(tiles) @ w.reshape(tiles)).mT.reshape(v.shape)


def gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT


def sweep(factors: Factors, ridge: Tensor) -> Factors:
    """One update of each factor in turn; never increases error + λ·S of any start.

    `ridge` is λ > 0 of each start, shape (starts,). The result's first two factors have rows of norm 1.
    """
    unit = [unit_rows(f) for f in factors]
    grams = [gram(f) for f in unit]
    last = unit[2]
    for own, left, right in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        normal = grams[left] * grams[right]
        normal.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
        cholesky = torch.linalg.cholesky_ex(normal).L
        last = torch.cholesky_solve(contract(unit[left], unit[right]), cholesky)
        if own < 2:
            unit[own] = unit_rows(last)
            grams[own] = gram(unit[own])
    return [unit[0], unit[1], last]


def error_and_amplification(factors: Factors) -> tuple[Tensor, Tensor]:
    """(‖T − T̂‖²/t³, S) of every start, from the residual itself: an exact start has an error of 1e-30 and not 1e-15."""
    a, b, c = factors
    t = isqrt(a.shape[-1])
    khatri_rao = (a[..., :, None] * b[..., None, :]).flatten(-2)
    residual = (khatri_rao.mT @ c).view(-1, t**2, t**2, t**2) - cyclic_tensor(t).to(a.device)
    amplification = (a.square().sum(-1) * b.square().sum(-1) * c.square().sum(-1)).sum(-1)
    return residual.square().sum((1, 2, 3)) / t**3, amplification / t**3


@cache
def cyclic_tensor(tile: int) -> Tensor:
    """The coefficients of trace(A·B·C), shape (t², t², t²)."""
    tiles = matmul_tensor(tile).view(tile**2, tile**2, tile, tile)
    return tiles.mT.reshape(tile**2, tile**2, tile**2)


def minimise(factors: Factors, ridge: float, sweeps: int, limit: float) -> tuple[Factors, Tensor]:
    """Sweeps with a ridge that falls while S ≤ `limit` and rises above it, so that it ends where S meets the limit.

    Returns the best factors met with S ≤ `limit`, those given among them, and their errors, shape (starts,); a start
    that never got there has error infinity and the factors it came with.
    """
    best = factors
    errors = torch.full((len(factors[0]),), torch.inf, dtype=torch.float64, device=factors[0].device)
    ridges = torch.full_like(errors, ridge)
    for step in range(sweeps + 1):
        if step:
            factors = sweep(factors, ridges)
        if step % CHECK_EVERY == 0 or step == sweeps:
            error, amplification = error_and_amplification(factors)
            within = amplification <= limit * (1 - SLACK)  # false for NaN
            better = within & (error < errors)
            errors = torch.where(better, error, errors)
            best = [torch.where(better[:, None, None], f, b) for f, b in zip(factors, best, strict=True)]
            ridges = torch.where(within, ridges * RIDGE_DOWN, ridges * RIDGE_UP).clamp(RIDGE_MIN, RIDGE_MAX)
    return best, errors


def to_basis(factors: Factors, name: str = "als") -> Basis:
    """The basis of one start, whose factors have shape (rank, t²)."""
    a, b, c = factors
    rank, tile = len(a), isqrt(a.shape[1])
    return Basis(name, tile, rank, a, b, c.reshape(rank, tile, tile).mT.reshape(rank, tile**2))


def from_basis(basis: Basis) -> Factors:
    """Its factors, of shape (rank, t²)."""
    tiles = basis.decode.reshape(basis.rank, basis.tile, basis.tile)
    return [basis.encode_x, basis.encode_w, tiles.mT.reshape(basis.rank, basis.tile**2)]
