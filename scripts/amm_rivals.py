"""Rivals of STL as approximate matrix multiplication: what else can be done for X·W with the weight W known beforehand.

Each function gives an `Approximation` that costs at most `budget` multiply-accumulates (MACs) once X is there, or None
where the budget is too small for it. Preparing W is free, as encoding it is for STL; work on X counts. Additions alone,
comparisons, roots and the index arithmetic of a sparse product count for nothing, which favours the pruned weights.

X has shape (samples, n, k): rows of different samples share no tile. W has shape (k, m). Both are float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stl import Basis, STLLinear, stl_matmul
from stl.flops import stl_count


@dataclass(frozen=True)
class Approximation:
    """A way to compute about X·W: `product` of X in some floating-point type, in that type, for `macs` MACs."""

    method: str
    macs: int
    product: Callable[[Tensor], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)  # what its row says of it beside the name


@dataclass(frozen=True, eq=False)
class Weight:
    """W (k, m) in float64, and what is worked out of it once."""

    matrix: Tensor

    @cached_property
    def _directions(self) -> Tensor:
        """The right singular vectors of W as columns, largest value first; WᵀW gives them sooner than the SVD."""
        return torch.linalg.eigh(self.matrix.T @ self.matrix).eigenvectors.flip(1)

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (k, rank) and B (rank, m) whose product is nearest to W: W·V·Vᵀ, V being the first right singular vectors
        (Eckart and Young 1936)."""
        vectors = self._directions[:, :rank]
        return self.matrix @ vectors, vectors.T


def dense(x: Tensor, w: Tensor) -> Approximation:
    """The product itself: what its error in low precision is."""
    return Approximation("dense", x[..., 0].numel() * w.numel(), _chain(w))


def stl(x: Tensor, w: Tensor, basis: Basis) -> Approximation:
    """The Strassen-Tile product, counted as the project counts its layers: encode, core and decode."""
    k, m = w.shape
    layer = STLLinear(k, m, bias=False, tile=basis.tile, rank=basis.rank, basis=basis.name, device="meta")
    facts = {"tile": basis.tile, "rank": basis.rank, "basis": basis.name, "amplification": basis.amplification}
    facts["predicted"] = basis.error**0.5
    macs = stl_count("", layer, x.shape).macs
    return Approximation("stl", macs, _stl(w, basis), facts)


def pruned_2_of_4(x: Tensor, w: Tensor) -> Approximation:
    """The two largest of every four weights along k stay (Mishra et al., arXiv 2104.08378): half the MACs, always."""
    k, m = w.shape
    groups = F.pad(w, (0, 0, 0, -k % 4)).unflatten(0, (-1, 4))
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, 1).indices, 1)
    return Approximation("2:4", x[..., 0].numel() * len(groups) * 2 * m, _chain((groups * kept).flatten(0, 1)[:k]))


def pruned(x: Tensor, w: Tensor, budget: int) -> Approximation | None:
    """The largest weights stay, wherever they are (Han et al., arXiv 1506.02626); each costs a MAC a row."""
    rows = x[..., 0].numel()
    count = min(budget // rows, w.numel())
    if count < 1:
        return None
    flat = w.flatten()
    kept = torch.zeros_like(flat).index_fill_(0, flat.abs().topk(count).indices, 1)
    return Approximation("pruned", rows * count, _chain((flat * kept).view_as(w)), {"kept": count})


def low_rank(x: Tensor, weight: Weight, budget: int) -> Approximation | None:
    """X·A·B, with A·B the truncated singular value decomposition of W."""
    rows = x[..., 0].numel()
    rank = min(budget // (rows * sum(weight.matrix.shape)), *weight.matrix.shape)
    if rank < 1:
        return None
    return Approximation("svd", rows * rank * sum(weight.matrix.shape), _chain(*weight.low_rank(rank)), {"kept": rank})


def low_rank_and_stl(
    x: Tensor, weight: Weight, budget: int, choices: Sequence[tuple[Basis, int]]
) -> Approximation | None:
    """W = A·B + the rest, the rest by STL; `choices` are bases with their MACs.

    Of the bases that leave MACs for a rank of at least one, that which does best on this very X: no choice that is made
    beforehand does better.
    """
    rows, sizes = x[..., 0].numel(), sum(weight.matrix.shape)
    ways = []
    for basis, spent in choices:
        rank = min((budget - spent) // (rows * sizes), *weight.matrix.shape)
        if rank >= 1:
            a, b = weight.low_rank(rank)
            product = _sum(_chain(a, b), _stl(weight.matrix - a @ b, basis))
            facts = {"kept": rank, "tile": basis.tile, "rank": basis.rank, "basis": basis.name}
            ways.append(Approximation("svd + stl", spent + rows * sizes * rank, product, facts))
    single = x.float()
    exact = single @ weight.matrix.float()
    return min(ways, key=lambda way: (way.product(single) - exact).norm().item(), default=None)


def sampled_columns(x: Tensor, w: Tensor, budget: int, seed: int) -> Approximation | None:
    """Columns of X and rows of W, drawn c times with p ∝ |X_i|·|W_i| and scaled by 1/(c·p): no bias, and the least
    variance of all such draws, ((Σ|X_i|·|W_i|)² − ‖XW‖²)/c in the squared Frobenius norm (Drineas, Kannan and Mahoney,
    SIAM J. Comput. 36, 2006).

    The norms of the columns of X cost n·k MACs, the scaling c·m, the product n·c·m.
    """
    rows, (k, m) = x[..., 0].numel(), w.shape
    count = (budget - rows * k) // (m * (rows + 1))
    if count < 1:
        return None

    def product(x: Tensor) -> Tensor:
        weights = _column_weights(x, w)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        scales = weights.sum() / (count * weights[chosen])
        return x[..., chosen] @ (w[chosen] * scales[:, None]).to(x.dtype)

    return Approximation("sampled columns", rows * k + count * m * (rows + 1), product, {"kept": count})


def largest_columns(x: Tensor, w: Tensor, budget: int) -> Approximation | None:
    """The c columns of X and rows of W with the largest |X_i|·|W_i|, not scaled (Adelman et al., arXiv 1805.08079).

    The norms of the columns of X cost n·k MACs, the product n·c·m.
    """
    rows, (k, m) = x[..., 0].numel(), w.shape
    count = min((budget - rows * k) // (rows * m), k)
    if count < 1:
        return None

    def product(x: Tensor) -> Tensor:
        chosen = _column_weights(x, w).topk(count).indices
        return x[..., chosen] @ w[chosen].to(x.dtype)

    return Approximation("largest columns", rows * k + rows * count * m, product, {"kept": count})


def sketched(x: Tensor, w: Tensor, budget: int, seed: int) -> Approximation | None:
    """(X·S)·(Sᵀ·W), S (k, c) Gaussian with variance 1/c: a Johnson–Lindenstrauss projection of the inner axis (Sarlós,
    FOCS 2006). No bias; the expected squared error is (‖X‖²‖W‖² + ‖XW‖²)/c."""
    rows, (k, m) = x[..., 0].numel(), w.shape
    count = budget // (rows * (k + m))
    if count < 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(k, count, dtype=w.dtype, generator=generator) / count**0.5
    return Approximation("sketched", rows * count * (k + m), _chain(sketch, sketch.T @ w), {"kept": count})


def _chain(*factors: Tensor) -> Callable[[Tensor], Tensor]:
    """X times one factor after the other, all in the type of X."""
    return lambda x: reduce(lambda y, factor: y @ factor.to(y.dtype), factors, x)


def _stl(w: Tensor, basis: Basis) -> Callable[[Tensor], Tensor]:
    return lambda x: stl_matmul(x, w.to(x.dtype), basis)


def _sum(*products: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: reduce(torch.add, (product(x) for product in products))


def _column_weights(x: Tensor, w: Tensor) -> Tensor:
    """|X_i|·|W_i| for every column i of X, float64 (k,)."""
    return x.double().flatten(0, -2).norm(dim=0) * w.norm(dim=1)
