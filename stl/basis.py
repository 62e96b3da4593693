"""A basis: the three matrices that define a Strassen-Tile operator, and the registry of families that make them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt

import torch
from torch import Tensor

from stl.errors import SettingError

NAME_LIMIT = 24


def matmul_tensor(tile: int) -> Tensor:
    """The t×t×t matrix-multiplication tensor, shape (t², t², t²), float64.

    Entry [a, b, c] is 1 where entry a of X times entry b of W contributes to entry c of X·W, all row-major.
    """
    eye = torch.eye(tile, dtype=torch.float64)
    return torch.einsum("ip,kq,jr->ikqjpr", eye, eye, eye).reshape(tile**2, tile**2, tile**2)


@dataclass(frozen=True, eq=False)
class Basis:
    """The three matrices of the operator, each float64 of shape (rank, tile²), over row-major tiles.

    Y_IJ = unvec(decodeᵀ · Σ_K (encode_x·vec(X_IK)) ⊙ (encode_w·vec(W_KJ))), arXiv 2503.12211.

    Raises SettingError where a matrix has another shape or a value that is not finite.
    """

    name: str
    tile: int
    rank: int
    encode_x: Tensor
    encode_w: Tensor
    decode: Tensor

    def __post_init__(self) -> None:
        if not self.name.isascii() or len(self.name) > NAME_LIMIT or " " in self.name:
            raise SettingError(f"basis name {self.name!r} must be at most {NAME_LIMIT} ASCII characters without spaces")
        for role in ("encode_x", "encode_w", "decode"):
            matrix = getattr(self, role).detach().to("cpu", torch.float64, copy=True)
            if matrix.shape != (self.rank, self.tile**2):
                raise SettingError(
                    f"basis {self.name!r}: {role} has shape {tuple(matrix.shape)}; "
                    f"tile={self.tile} rank={self.rank} needs {(self.rank, self.tile**2)}"
                )
            if not matrix.isfinite().all():
                raise SettingError(f"basis {self.name!r}: {role} holds NaN or infinite values; recompute it")
            object.__setattr__(self, role, matrix)

    @cached_property
    def _residual(self) -> tuple[float, float]:
        """(‖T − T̂‖², max |T − T̂|), one slice of the tensor at a time so that t = 16 fits in memory."""
        t, squared, largest = self.tile, 0.0, 0.0
        eye = torch.eye(t, dtype=torch.float64, device="cpu")  # as in `_build`
        for i in range(t):
            for k in range(t):
                # The slice of T that X[i, k] multiplies: W[k, j] goes to Y[i, j].
                exact = torch.einsum("q,jr,p->qjpr", eye[k], eye, eye[i]).reshape(t * t, t * t)
                slice_ = exact - (self.encode_x[:, i * t + k, None] * self.encode_w).T @ self.decode
                squared += slice_.square().sum().item()
                largest = max(largest, slice_.abs().max().item())
        return squared, largest

    @property
    def error(self) -> float:
        """‖T − T̂‖²/t³: the relative squared error of X·W for i.i.d. zero-mean X and W, whatever n, k, m."""
        return self._residual[0] / self.tile**3

    @property
    def exact(self) -> bool:
        """Whether the operator is matrix multiplication, to float64 rounding."""
        return self._residual[1] < 1e-10

    @cached_property
    def amplification(self) -> float:
        """S = Σ_q |encode_x_q|²·|encode_w_q|²·|decode_q|² / t³, which the rounding noise grows with.

        The root mean square noise in low precision is about √(½ + S) of the plain product's where the entries are round
        numbers; entries that are rounded themselves add to it.
        """
        norms = [m.square().sum(1) for m in (self.encode_x, self.encode_w, self.decode)]
        return (norms[0] * norms[1] * norms[2]).sum().item() / self.tile**3

    @cached_property
    def pivots(self) -> Tensor | None:
        """The pivot row p(q) of every channel, (r,) int64, or None where the basis is not causal.

        Channel q reads rows ≤ p(q) of a tile of X and writes rows ≥ p(q) of one of Y. p(q) is the last row where
        encode_x_q has an entry other than zero; decode_q must have none before it.
        """
        rows = torch.arange(self.tile, device="cpu")  # as in `_build`
        read, written = (m.view(-1, self.tile, self.tile).ne(0).any(2) for m in (self.encode_x, self.decode))
        last = (rows * read).amax(1)
        first = torch.where(written, rows, self.tile).amin(1)
        return last if bool((last <= first).all()) else None

    @property
    def causal(self) -> bool:
        """Whether row i of an output tile depends on rows ≤ i of the input tile only, whatever the encoded weight.

        To the bit, where the numbers are finite. Exact bases are not causal for that: in them later rows cancel out up
        to rounding.
        """
        return self.pivots is not None

    def kron(self, other: "Basis", name: str | None = None) -> "Basis":
        """The basis over tiles of tiles: tile and rank multiply, and the product of two exact bases is exact."""
        s, t = self.tile, other.tile

        def interleave(outer: Tensor, inner: Tensor) -> Tensor:
            return torch.einsum("pik,qjl->pqijkl", outer.view(-1, s, s), inner.view(-1, t, t)).reshape(-1, (s * t) ** 2)

        return Basis(
            name or f"{self.name}x{other.name}"[:NAME_LIMIT],
            s * t,
            self.rank * other.rank,
            interleave(self.encode_x, other.encode_x),
            interleave(self.encode_w, other.encode_w),
            interleave(self.decode, other.decode),
        )

    def __repr__(self) -> str:
        return f"Basis({self.name!r}, tile={self.tile}, rank={self.rank})"


def least_squares_encode_w(encode_x: Tensor, decode: Tensor) -> Tensor:
    """The encode_w with the smallest error for a given encoder and decoder, all of shape (r, t²).

    The normal equations of ‖T − Σ_q encode_x_q ⊗ encode_w_q ⊗ decode_q‖² in encode_w are G·encode_w = h with
    G = (encode_x·encode_xᵀ) ∘ (decode·decodeᵀ) and h_q = unvec(encode_x_q)ᵀ·unvec(decode_q). Where G is singular,
    the solution of least norm is taken.
    """
    rank, tile = len(encode_x), isqrt(encode_x.shape[1])
    gram = (encode_x @ encode_x.T) * (decode @ decode.T)
    target = encode_x.view(rank, tile, tile).mT @ decode.view(rank, tile, tile)
    return torch.linalg.lstsq(gram, target.reshape(rank, tile**2), driver="gelsd").solution


@dataclass(frozen=True)
class Family:
    """How one family of bases is built.

    `build(tile, rank)` gives the Basis; `ranks(tile)` the ranks it has, an empty collection where it has none.
    """

    name: str
    build: Callable[[int, int], Basis]
    ranks: Callable[[int], Collection[int]]


_families: dict[str, Family] = {}


def register_basis(name: str, ranks: Callable[[int], Collection[int]]) -> Callable:
    """Decorator that registers `build(tile, rank) -> Basis` as the family `name`; see `Family` for `ranks`."""

    def decorate(build: Callable[[int, int], Basis]) -> Callable[[int, int], Basis]:
        if name in _families:
            raise SettingError(f"basis family {name!r} is registered twice; give one of them another name")
        _families[name] = Family(name, build, ranks)
        return build

    return decorate


def available_ranks(name: str, tile: int) -> list[int]:
    """The ranks that the family `name` has for this tile size, ascending."""
    return sorted(set(_families[name].ranks(tile)))


def list_bases(tile: int | None = None, rank: int | None = None) -> list[str]:
    """Names of the registered families, sorted; with `tile` (and `rank`), of those that have such a basis.

    Raises SettingError for a rank without a tile.
    """
    if rank is not None and tile is None:
        raise SettingError(f"list_bases(rank={rank}) needs a tile as well: which ranks there are depends on it")
    names = sorted(_families)
    if tile is not None:
        ranks = {name: _families[name].ranks(tile) for name in names}  # not listed out: t³ of them at a large tile
        names = [name for name in names if (bool(ranks[name]) if rank is None else rank in ranks[name])]
    return names


def get_basis(name: str, tile: int = 4, rank: int = 16) -> Basis:
    """The basis of this family, tile size and rank; the same arguments always give the same matrices.

    Raises SettingError, with what exists instead, where there is no such basis.
    """
    if name not in _families:
        raise SettingError(f"basis={name!r} is unknown; choose one of {', '.join(list_bases())}")
    for setting, value in (("tile", tile), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{setting}={value!r} must be a positive whole number")
    if rank not in _families[name].ranks(tile):
        raise SettingError(_missing(name, tile, rank))
    return _build(name, tile, rank)


@lru_cache(maxsize=64)
def _build(name: str, tile: int, rank: int) -> Basis:
    with torch.device("cpu"):  # a model may be built under another default device
        return _families[name].build(tile, rank)


def _missing(name: str, tile: int, rank: int) -> str:
    own = {t: _ranges(available_ranks(name, t)) for t in sorted({2, 3, 4, 8, min(tile, 16)})}
    has = "; ".join(f"tile={t}: rank {text}" for t, text in own.items() if text) or f"none of tile={tile}"
    others = ", ".join(list_bases(tile, rank)) or "no family"
    return f"basis={name!r} has no tile={tile} rank={rank}; it has {has}; tile={tile} rank={rank} exists in: {others}"


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
