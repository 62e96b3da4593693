"""From an exact decomposition in floating point to one with entries 0, 1 and −1, exact over the rationals.

Exact decompositions lie in families: scaling the three vectors of a column and the change of bases
trace(A·B·C) = trace(P⁻¹AQ · Q⁻¹BR · R⁻¹CP) alone leave many numbers free, so entries can be held at round values, a few
at a time, while Levenberg–Marquardt brings the others back to a residual of zero. The way is that of Smirnov, "The
bilinear complexity and practical algorithms for matrix multiplication", Comput. Math. Math. Phys. 53 (2013), there with
ALS; the linear convergence of ALS is too slow for the hundreds of solves it takes.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import isqrt

import torch
from torch import Tensor

from stl.basis import Basis
from stl.cp.als import cyclic_tensor, from_basis, to_basis
from stl.errors import SettingError

STAGES = ((0.0,), (0.0, 1.0, -1.0))  # zeros first: what scaling is left free then turns the rest into signs
REACH = 0.8  # how far an entry may be moved at once
LARGEST = 3.0  # an entry of a decomposition; beyond, it is on its way to infinity
FIRST, AT_ONCE = 8, 32  # entries held in one go: to begin with, and at most
STEPS = 25  # of Levenberg–Marquardt for one solve
ZERO = 1e-22  # the squared residual that stands for an exact decomposition
DAMPING, DAMPING_MIN, DAMPING_MAX = 1e-3, 1e-9, 1e3


def is_exact_over_rationals(basis: Basis) -> bool:
    """Whether the matrices, float64 numbers taken as the fractions they are, satisfy the Brent equations exactly.

    The t⁶ equations Σ_q encode_x·encode_w·decode = T: Brent, "Algorithms for matrix multiplication" (1970).
    """
    sparse = [
        [[(place, Fraction(value)) for place, value in enumerate(row) if value] for row in matrix.tolist()]
        for matrix in (basis.encode_x, basis.encode_w, basis.decode)
    ]
    tensor: dict[tuple[int, int, int], Fraction] = {}
    for rows in zip(*sparse, strict=True):
        for (a, x), (b, w), (c, y) in product(*rows):
            tensor[a, b, c] = tensor.get((a, b, c), Fraction(0)) + x * w * y
    t = basis.tile
    wanted = {(i * t + k, k * t + j, i * t + j): 1 for i, k, j in product(range(t), repeat=3)}
    return {place: value for place, value in tensor.items() if value} == wanted


def discretise(basis: Basis) -> Basis | None:
    """An exact basis with entries 0, 1 and −1, reached from this one, or None where the way ends before it.

    A basis that is exact over the rationals comes back as it is. Whether the way goes through depends on where it
    starts: another seed of the search is another try. Raises SettingError for a basis that is not exact.
    """
    if not basis.exact:
        raise SettingError(f"basis {basis.name!r} has error {basis.error:.3g}; discretise an exact one")
    if is_exact_over_rationals(basis):
        return basis
    entries = _largest_to_one(torch.stack(from_basis(basis)))
    free = entries != 1
    for values in STAGES:
        entries, free = _hold(entries, free, values)
    found = to_basis(list(entries), basis.name)
    return found if not free.any() and is_exact_over_rationals(found) else None


def _largest_to_one(entries: Tensor) -> Tensor:
    """The same decomposition, shape (3, rank, t²), with 1 as the largest entry of its first two vectors of a column."""
    peaks = entries.gather(2, entries.abs().argmax(2, keepdim=True))
    return torch.stack([entries[0] / peaks[0], entries[1] / peaks[1], entries[2] * peaks[0] * peaks[1]])


def _hold(entries: Tensor, free: Tensor, values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Free entries held at one of `values` until none is left that bears it: the nearest first, several at once while
    that goes well. `entries` and `free` have shape (3, rank, t²)."""
    choices = torch.tensor(values, dtype=entries.dtype)
    refused = torch.zeros(*entries.shape, len(values), dtype=torch.bool)
    count = FIRST
    while True:
        distance = (entries[..., None] - choices).abs()
        distance[refused | ~free[..., None]] = torch.inf
        nearest, choice = distance.min(-1)
        order = nearest.flatten().argsort(stable=True)[:count]
        order = order[nearest.flatten()[order] < REACH]
        if not len(order):
            return entries, free
        tried, still_free = entries.clone(), free.clone()
        tried.view(-1)[order] = choices[choice.flatten()[order]]
        still_free.view(-1)[order] = False
        solved = _solve(tried, still_free)
        if solved is not None:
            entries, free, count = solved, still_free, min(2 * count, AT_ONCE)
        elif len(order) > 1:
            count = max(1, len(order) // 4)
        else:
            refused.view(-1, len(values))[order, choice.flatten()[order]] = True


def _solve(entries: Tensor, free: Tensor) -> Tensor | None:
    """The free entries moved until the decomposition is exact, by Levenberg–Marquardt; None if that fails."""
    tile = isqrt(entries.shape[-1])
    wanted, damping = cyclic_tensor(tile), DAMPING
    residual = _tensor(entries) - wanted
    for _ in range(STEPS):
        if residual.square().sum() < ZERO:
            return entries if entries.abs().max() < LARGEST else None
        jacobian = _jacobian(entries)[:, free.flatten()]
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ residual.flatten()
        while True:
            damped = normal + damping * torch.eye(len(normal), dtype=normal.dtype)
            step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky_ex(damped).L)[:, 0]
            moved = entries.clone()
            moved[free] -= step
            left = _tensor(moved) - wanted
            if left.square().sum() < residual.square().sum():  # false for NaN
                break
            damping *= 4
            if damping > DAMPING_MAX:
                return None
        entries, residual, damping = moved, left, max(damping / 5, DAMPING_MIN)
    return None


def _tensor(entries: Tensor) -> Tensor:
    return torch.einsum("qa,qb,qc->abc", *entries)


def _jacobian(entries: Tensor) -> Tensor:
    """The derivative of every coefficient of the tensor by every entry, shape (t⁶, 3·rank·t²)."""
    a, b, c = entries
    eye = torch.eye(entries.shape[-1], dtype=entries.dtype)
    parts = (("xa,qb,qc->abcqx", eye, b, c), ("qa,xb,qc->abcqx", a, eye, c), ("qa,qb,xc->abcqx", a, b, eye))
    return torch.cat([torch.einsum(*part).reshape(len(eye) ** 3, -1) for part in parts], dim=1)
