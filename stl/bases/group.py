"""Encoders over an abelian group: the tiles are put into its group algebra, multiplied there, and the result read off.

An index map puts entry (i, k) of X at a multiple of a group element; another says at which element, and with which
weight, entry (i, j) of Y is read; W is the element of the group algebra of the least squared error. The product in the
group algebra is a convolution, which the real Fourier transform makes `real_rank` products of real numbers. This is the
route of Cohn, Umans, "A group-theoretic approach to fast matrix multiplication" (FOCS 2003, arXiv math/0307321), cut
short: index maps with their triple product property give exact products, but over an abelian group only from |G| = t³
on. Below, the maps collide and the basis is approximate. arXiv 2503.12211 names this route to universal encoders. The
matrix-multiplication tensor is cyclically symmetric, so that the error does not depend on which of X, W and Y has the
least squares: it is W, so that encoder and decoder, the two that a layer keeps, are weighted characters.

`hadamard` is the case of Z₂^(2·log₂t) with entry (i, k) of X at the element (i, k), entry (i, j) of Y at (i, j), all in
binary, and all weights 1: its encoder and decoder are the characters of that group, and W_kj lies at (0, k + j).

`scripts/find_group_bases.py` searches for the maps; group.json beside this file keeps, for every rank, those of the
group of that real rank which did best, with error, S and how they were found.
"""

import math
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from stl.basis import Basis, register_basis
from stl.cp.table import read_head, shipped, shipped_ranks, verify
from stl.errors import SettingError

Maps = tuple[Tensor, Tensor, Tensor, Tensor]  # what MAPS names
TINY = 1e-30  # the norm that stands for zero
MAPS = ("places_x", "weights_x", "places_y", "weights_y")


def real_rank(orders: tuple[int, ...]) -> int:
    """Products of real numbers that the real group algebra of Z_n1 × Z_n2 × … takes: |G| for Z₂^m, more for all others.

    A real character takes one product and a pair of conjugate ones a complex product, which takes three; there are 2^e
    real characters, e the number of even orders. That is also the least: 2·dim − number of simple components (Alder,
    Strassen, "On the algorithmic complexity of associative algebras", Theor. Comput. Sci. 15, 1981).
    """
    real = 2 ** sum(order % 2 == 0 for order in orders)
    return real + 3 * (math.prod(orders) - real) // 2


def abelian_groups(rank_limit: int) -> list[tuple[int, ...]]:
    """The abelian groups of real rank ≤ `rank_limit`, each once, as the orders of its primary cyclic factors."""

    def partitions(number: int, largest: int) -> list[tuple[int, ...]]:
        if number == 0:
            return [()]
        return [(n, *rest) for n in range(min(number, largest), 0, -1) for rest in partitions(number - n, n)]

    groups = []
    for size in range(1, rank_limit + 1):  # real_rank ≥ |G|
        factors, left = [], size
        for prime in range(2, size + 1):
            exponent = 0
            while left % prime == 0:
                left, exponent = left // prime, exponent + 1
            factors.append([tuple(prime**n for n in parts) for parts in partitions(exponent, exponent)])
        groups += [sum(choice, ()) for choice in product(*factors)]
    return [orders for orders in groups if real_rank(orders) <= rank_limit]


@cache
def elements(orders: tuple[int, ...]) -> Tensor:
    """The elements of Z_n1 × Z_n2 × …, (|G|, number of orders) int64, the last coordinate counting fastest."""
    numbers = torch.tensor(list(product(*map(range, orders))), dtype=torch.int64)
    return numbers.reshape(math.prod(orders), len(orders))


@cache
def differences(orders: tuple[int, ...]) -> Tensor:
    """The number of element g − h at [g, h], (|G|, |G|) int64, elements numbered as in `elements`."""
    all_, sizes = elements(orders), torch.tensor(orders, dtype=torch.int64)
    strides = torch.tensor([math.prod(orders[i + 1 :]) for i in range(len(orders))], dtype=torch.int64)
    return ((all_[:, None] - all_[None]) % sizes * strides).sum(-1)


@cache
def transforms(orders: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, z), float64 of shape (real_rank, |G|), with u ∗ v = zᵀ·((x·u) ∘ (w·v)) for u and v in the group algebra.

    For a pair of conjugate characters, with x̂ = a + bi and ŵ = c + di, the products are (a + b)·c, a·(d − c) and
    b·(c + d): the real part is the first less the third, the imaginary one the first plus the second. Over Z₂^m all
    entries are powers of two and their negatives, so that an exact basis is exact over the rationals; where √|G| is one
    too, the rows of x and z have norm 1.
    """
    size = math.prod(orders)
    all_ = elements(orders).double()
    angles = 2 * math.pi * (all_ / torch.tensor(orders, dtype=torch.float64)) @ all_.T
    negative = differences(orders)[0]
    x: list[Tensor] = []
    w: list[Tensor] = []
    z: list[Tensor] = []
    for q in range(size):
        cosine, sine = angles[q].cos(), angles[q].sin()
        if negative[q] == q:
            x, w, z = [*x, cosine.round()], [*w, cosine.round()], [*z, cosine.round()]
        elif negative[q] > q:
            scale = 2**0.5  # z reads a pair twice; half of that scale stands in x
            x += [scale * (cosine + sine), scale * cosine, scale * sine]
            w += [cosine, sine - cosine, cosine + sine]
            z += [scale * (cosine + sine), scale * sine, -scale * cosine]
    near_root = 2.0 ** (size.bit_length() // 2)
    return torch.stack(x) / near_root, torch.stack(w), torch.stack(z) * (near_root / size)


def fit_w(orders: tuple[int, ...], tile: int, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares W of many pairs of index maps side by side, each of `maps` of shape (pairs, t²).

    W_kj lies at g with the weight Σ_i x·y over the i with place_y(i, j) − place_x(i, k) = g, divided by Σ x²·y² over
    all pairs of entries of X and Y with that difference: the normal matrix is diagonal. Returns the number of that
    difference for every entry of Y and X (pairs, t², t²), and the two sums, (pairs, |G|, t²) and (pairs, |G|).
    """
    places_x, weights_x, places_y, weights_y = maps
    pairs, size, entries = len(places_x), math.prod(orders), tile**2
    apart = differences(orders)[places_y[:, :, None], places_x[:, None, :]]
    square = (weights_y[:, :, None] * weights_x[:, None, :]).square()
    norm = weights_x.new_zeros(pairs, size).scatter_add_(1, apart.flatten(1), square.flatten(1))
    x, w, y = scalar_products(tile)
    value = weights_y[:, y] * weights_x[:, x]
    sums = weights_x.new_zeros(pairs, size * entries).scatter_add_(1, apart[:, y, x] * entries + w, value)
    return apart, sums.view(pairs, size, entries), norm


def scalar_products(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of X, W and Y, row-major, of the t³ scalar products of plain multiplication."""
    i, k, j = (index.flatten() for index in torch.meshgrid(*[torch.arange(tile)] * 3, indexing="ij"))
    return i * tile + k, k * tile + j, i * tile + j


def encode(orders: tuple[int, ...], tile: int, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """encode_x, encode_w and decode of many pairs of index maps, each (pairs, real_rank, t²); see `fit_w`."""

    def lay(places: Tensor, weights: Tensor) -> Tensor:
        return weights.new_zeros(len(places), math.prod(orders), tile**2).scatter_(1, places[:, None], weights[:, None])

    _, sums, norm = fit_w(orders, tile, maps)
    x, w, y = transforms(orders)
    return x @ lay(*maps[:2]), w @ (sums / norm.clamp_min(TINY)[:, :, None]), y @ lay(*maps[2:])


def group_basis(orders: tuple[int, ...], tile: int, maps: Maps) -> Basis:
    """The basis of two index maps over Z_n1 × Z_n2 × …, of rank `real_rank(orders)`.

    `maps` are (places_x, weights_x, places_y, weights_y), each of shape (t²,) over the row-major entries of X or Y:
    the number of an element, and what the entry is multiplied by there.
    """
    a, b, c, d = (values[None] for values in maps)
    x, w, y = encode(orders, tile, (a, b, c, d))
    return Basis("group", tile, real_rank(orders), x[0], w[0], y[0])


def read_row(row: Any, where: str) -> Basis:
    """The basis of a row of group.json; raises SettingError, which begins with `where`, if anything in it is wrong."""
    tile, rank, where = read_head(row, where)
    orders = row.get("group")
    if not isinstance(orders, list) or not all(type(order) is int and order > 1 for order in orders):
        raise SettingError(f"{where}: group={orders!r} is not a list of orders above 1; find it again")
    orders = tuple(orders)
    if real_rank(orders) != rank:
        raise SettingError(f"{where}: group={list(orders)} has real rank {real_rank(orders)}; find it again")
    maps = []
    for key, kinds in zip(MAPS, ((int,), (int, float)) * 2, strict=True):
        numbers = row.get(key)
        if not isinstance(numbers, list) or not all(type(n) in kinds and math.isfinite(n) for n in numbers):
            raise SettingError(
                f"{where}: {key} is not a list of {'finite' if float in kinds else 'whole'} numbers; find it again"
            )
        if len(numbers) != tile**2:
            raise SettingError(f"{where}: {key} has {len(numbers)} numbers, not tile² = {tile**2}; find it again")
        if float not in kinds and not all(0 <= n < math.prod(orders) for n in numbers):
            raise SettingError(f"{where}: {key} has elements beyond 0 to {math.prod(orders) - 1}; find it again")
        maps.append(torch.tensor(numbers, dtype=torch.float64 if float in kinds else torch.int64))
    basis = group_basis(orders, tile, (maps[0], maps[1], maps[2], maps[3]))
    verify(row, basis, where)
    return basis


@register_basis("group", ranks=partial(shipped_ranks, "group"))
def group(tile: int, rank: int) -> Basis:
    return read_row(shipped("group")[tile, rank], "stl/bases/group.json")
