"""How a program addresses tiles in a matrix and channels in an encoded one.

Names, here and in the kernels: X (B, n, k) holds tiles of T × T entries, N·K of them in each of its B samples, so that
P = B·N is the number of rows of tiles. Channels are (R, P, K), contiguous, or columns of such. A program holds BLOCK
groups of one row of tiles p. A group is S tiles side by side, as many as fill what `tl.dot` takes: one, but four of
tiles of 2. Its TT = S·T² entries are a column of (TT, BLOCK), row-major over all of the group, TT/T in a row; its
channels are a column of (RP, BLOCK), channel q of its tile s in row q·S + s. RP is R·S rounded up to what `tl.dot`
takes; the rest is zeros. A number that is not finite in one tile of a group leaves none in the group.

Where the tiles of a row do not fill the blocks of its programs, these take the rows of several samples side by side as
one, p: BESIDE is how many samples, and how many groups each of them has in it; (1, 0) where one sample is alone.
"""

from functools import lru_cache
from math import ceil, gcd, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of a launch. Where each leaves sums behind, as many as a GPU of 132 multiprocessors holds of one warp at
# once; else a few times what it holds.
PROGRAMS, MANY_PROGRAMS = 1408, 3200
MOST_ROWS = 1024  # of tiles that a program takes one after the other
LEAST = 16  # of each size of what `tl.dot` takes
# How kernels store encoded tiles, which a GEMM reads next: the L2 cache keeps them before all else.
READ_NEXT = tl.constexpr("evict_last")

# Of layers whose sizes come again and again, called one by one, the CPU's time matters.
remembered = lru_cache(maxsize=1024)


class Tiling(NamedTuple):
    """The tiles of a matrix (samples, n, k): `columns`, or K, in a row of tiles, those from ⌈k/t⌉ on empty. Programs
    take those of `together` samples as one row."""

    samples: int
    n: int
    k: int
    tile: int
    columns: int
    together: int = 1

    @classmethod
    def of(cls, x: Tensor, tile: int, columns: int | None = None) -> "Tiling":
        samples, n, k = x.shape
        return cls(samples, n, k, tile, ceil(k / tile) if columns is None else columns)

    @property
    def group(self) -> int:
        """S, tiles of a group."""
        return max(1, LEAST // self.tile**2)

    @property
    def alone(self) -> int:
        """Groups in a row of tiles of one sample."""
        return ceil(self.columns / self.group)

    @property
    def groups(self) -> int:
        """In a row of tiles as programs take it."""
        return self.together * self.alone

    @property
    def rows(self) -> int:
        """Of tiles, as programs take them: P, or P/together."""
        return self.samples // self.together * ceil(self.n / self.tile)

    def in_whole_blocks(self, block: int, *matrices: Tensor | None) -> "Tiling":
        """The same tiles, with as few samples together as make their groups fill blocks of `block` tiles of 4 × 4.

        As it is where tiles or groups are not full, or the samples are no multiple of so few. Rows of full tiles are
        samples of their own, where all of them are equally far apart in each of these matrices (samples, n, ·).
        """
        even = all(of is None or len(of) == 1 or of.stride(0) == of.shape[1] * of.stride(1) for of in matrices)
        return _in_whole_blocks(self, block, even)

    def strides(self, matrix: Tensor | None) -> tuple[int, ...]:
        """From sample to sample, row to row and feature to feature of a matrix; 0 of none."""
        if matrix is None:
            return (0, 0, 0)
        sample, row, feature = matrix.stride()
        return sample if self.samples == len(matrix) else self.tile * row, row, feature

    def sizes(self) -> tuple[int, ...]:
        """What the kernels take: n, k, N, P and K."""
        rows = ceil(self.n / self.tile)
        return self.n, self.k, rows, self.samples * rows, self.columns


def padded(entries: int) -> int:
    """Entries of a vector, rounded up to what `tl.dot` takes."""
    return max(LEAST, triton.next_power_of_2(entries))


def precision(dtype: torch.dtype) -> str:
    """The arithmetic of `multiply`: float32 stays float32, and so does all in the interpreter, which has no bf16."""
    return "ieee" if dtype == torch.float32 or triton.knobs.runtime.interpret else "tf32"


class Grid(NamedTuple):
    """How a launch divides the tiles: each program takes `block` groups of `rows` rows of tiles, by `warps` warps."""

    block: int
    rows: int
    warps: int
    blocks: int
    chunks: int

    @property
    def programs(self) -> int:
        return self.blocks * self.chunks


def rows_each(rows: int, programs: int, most: int = MOST_ROWS) -> int:
    """As many for each program, one after the other, as leave this number of programs, since what a program has loaded
    serves all of them and what it sums is one share; a power of two, since a kernel is compiled for it."""
    return min(most, 2 ** int(log2(max(1, rows // programs))))


def block_size(tiling: Tiling, block: int) -> int:
    """Groups that have as many entries as `block` tiles of 4 × 4."""
    return max(LEAST, block * 16 // (tiling.group * tiling.tile**2))


@remembered
def _in_whole_blocks(tiling: Tiling, block: int, even: bool) -> Tiling:
    size = block_size(tiling, block)
    together = size // gcd(size, tiling.groups)
    if together == 1 or tiling.k < tiling.columns * tiling.tile or tiling.columns % tiling.group:
        return tiling
    of_rows = tiling
    if even and tiling.n % tiling.tile == 0:
        of_rows = tiling._replace(samples=tiling.rows, n=tiling.tile)
    return tiling if of_rows.samples % together else of_rows._replace(together=together)


@remembered
def divide(
    tiling: Tiling, block: int, warps: int, programs: int, most_rows: int = MOST_ROWS, most_empty: float = 0.0
) -> Grid:
    """The grid of a kernel that does well with `block` tiles of 4 × 4 in `warps` warps.

    Of others as many entries; half of the block and the warps where more of the last block than `most_empty` of all
    tiles would be empty.
    """
    whole = block_size(tiling, block)
    fits = -tiling.groups % whole <= most_empty * tiling.groups
    size = min(whole if fits else max(LEAST, whole // 2), padded(tiling.groups))
    blocks = ceil(tiling.groups / size)
    rows = rows_each(tiling.rows * blocks, programs, most_rows)
    return Grid(size, rows, max(1, warps * size // whole), blocks, ceil(tiling.rows / rows))


def few_channels(tiling: Tiling, dtype: torch.dtype, rank: int) -> bool:
    """Whether the channels of a group need few registers."""
    return dtype != torch.float32 and rank * tiling.group <= 32


def divide_for_sums(tiling: Tiling, dtype: torch.dtype, rank: int) -> Grid:
    """The grid of a kernel whose programs each leave a share of a sum behind."""
    return divide(tiling, 64, 1 if few_channels(tiling, dtype, rank) else 4, PROGRAMS)


@remembered
def constants(tiling: Tiling, rank: int, dtype: torch.dtype, grid: Grid) -> dict[str, Any]:
    """What a kernel is compiled for; the answer is shared, so do not change it. FULL: whether all rows of its programs
    exist, all entries of the groups that exist, and all tiles of its blocks."""
    entries = tiling.group * tiling.tile**2
    # Products of larger tiles take several steps, and of those by a warp group, which is four warps, ptxas 12.8 has let
    # some read from an address that was never computed.
    most_warps = 2 if entries > 16 and dtype != torch.float32 else grid.warps
    return {
        "T": tiling.tile,
        "R": rank,
        "S": tiling.group,
        "TT": entries,
        "RP": padded(rank * tiling.group),
        "BLOCK": grid.block,
        "ROWS": grid.rows,
        "PRECISION": precision(dtype),
        "FULL": (
            tiling.n % tiling.tile == 0 and tiling.rows % grid.rows == 0,
            tiling.k == tiling.columns * tiling.tile and tiling.columns % tiling.group == 0,
            tiling.columns * tiling.together % (tiling.group * grid.block) == 0,
        ),
        "BESIDE": (tiling.together, tiling.alone) if tiling.together > 1 else (1, 0),
        "num_warps": min(grid.warps, most_warps),
    }


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in float32; what low precisions lose, they have lost before."""
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_basis(matrix, R: tl.constexpr, T: tl.constexpr, RP: tl.constexpr, TT: tl.constexpr):
    """An encoder or decoder (R, T²) as (RP, TT), in which each tile of a group meets its own channels."""
    S: tl.constexpr = TT // (T * T)
    row, e = tl.arange(0, RP)[:, None], tl.arange(0, TT)[None, :]
    exist = (row < R * S) & (e < TT)
    if S == 1:
        return tl.load(matrix + row * (T * T) + e, mask=exist, other=0.0)
    column = e % (T * S)
    exist = exist & (column // T == row % S)
    return tl.load(matrix + row // S * (T * T) + e // (T * S) * T + column % T, mask=exist, other=0.0)


@triton.jit
def own_groups(j, BESIDE: tl.constexpr):
    """The groups j, each by its place in the row of tiles of its sample."""
    return j if BESIDE[0] == 1 else j % BESIDE[1]


@triton.jit
def tile_places(
    p, j, N, P, n, k, stride_b, stride_n, stride_k, T: tl.constexpr, TT: tl.constexpr,
    FULL: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Offsets (TT, BLOCK) of the entries of the groups j in the row of tiles p, and which of them exist."""
    W: tl.constexpr = TT // T
    e = tl.arange(0, TT)[:, None]
    row = ((p % N) * T).to(tl.int64) + e // W
    column = own_groups(j, BESIDE)[None, :] * W + e % W
    places = (p // N).to(tl.int64) * BESIDE[0] * stride_b + row * stride_n + column.to(tl.int64) * stride_k
    if BESIDE[0] > 1:
        places += (j // BESIDE[1]).to(tl.int64)[None, :] * stride_b
    return places, tiles_exist(p, j, N, P, n, k, T, TT, FULL, BESIDE)


@triton.jit
def tiles_exist(p, j, N, P, n, k, T: tl.constexpr, TT: tl.constexpr, FULL: tl.constexpr, BESIDE: tl.constexpr):
    """Which entries (TT, BLOCK) exist of the groups j in the row of tiles p; only what can be false is computed."""
    W: tl.constexpr = TT // T
    e = tl.arange(0, TT)[:, None]
    exist = tl.full((TT, j.shape[0]), True, tl.int1)
    if not FULL[0]:
        exist = exist & ((p % N) * T + e // W < n) & (p < P // BESIDE[0])
    if not FULL[1]:
        exist = exist & (j[None, :] * W + e % W < k)
    elif not FULL[2]:
        exist = exist & (j[None, :] * W < k)
    return exist


@triton.jit
def channel_places(
    p, j, N, P, K, width, R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr, FULL: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """Offsets (RP, BLOCK) of the channels of the groups j in the row of tiles p, which are `width` from row to row in
    memory, and which of them exist."""
    row = tl.arange(0, RP)[:, None]
    column = own_groups(j, BESIDE)[None, :] * S + row % S
    exist = tl.full((RP, j.shape[0]), True, tl.int1)
    if R * S < RP:
        exist = exist & (row < R * S)
    if not FULL[0]:
        exist = exist & (p < P // BESIDE[0])
    if not FULL[2]:
        exist = exist & (column < K)
    if BESIDE[0] > 1:
        width = width // (BESIDE[1] * S) * (BESIDE[1] * S)  # as it is, and known to be such a multiple
        p = (p // N) * (BESIDE[0] * N) + p % N
        column += (j // BESIDE[1]).to(tl.int64)[None, :] * N * width
    return ((row // S).to(tl.int64) * P + p) * width + column, exist


@triton.jit
def by_column(vector, j, k, T: tl.constexpr, TT: tl.constexpr):
    """A number for each of the k features, as float32 (TT, BLOCK); 0 behind the last."""
    column = j[None, :] * (TT // T) + tl.arange(0, TT)[:, None] % (TT // T)
    return tl.load(vector + column, mask=column < k, other=0.0).to(tl.float32)


@triton.jit
def store_product(product, total, pid, R: tl.constexpr, T: tl.constexpr, RP: tl.constexpr, TT: tl.constexpr):
    """One program's share of the gradient of a basis matrix, from (RP, TT), to total (programs, R, T²); of the tiles of
    a group, each with its own channels, the sum."""
    S: tl.constexpr = TT // (T * T)
    if S > 1:
        row, column = tl.arange(0, RP)[:, None], tl.arange(0, TT)[None, :] % (T * S)
        own = tl.where(column // T == row % S, product, 0.0)
        product = tl.reshape(tl.sum(tl.sum(tl.reshape(own, (RP // S, S, T, S, T)), 3), 1), (RP // S, T * T))
    q, e = tl.arange(0, RP // S)[:, None], tl.arange(0, T * T)[None, :]
    tl.store(total + (pid.to(tl.int64) * R + q) * (T * T) + e, product, mask=(q < R) & (e < T * T))


@triton.jit
def store_column_sums(tiles, total, chunk, j, k, T: tl.constexpr, TT: tl.constexpr):
    """One program's share of the sums over rows, from the sums (TT, BLOCK) of its tiles, to total (chunks, k)."""
    W: tl.constexpr = TT // T
    column = j[None, :] * W + tl.arange(0, W)[:, None]
    sums = tl.sum(tl.reshape(tiles, (T, W, tiles.shape[1])), 0)
    tl.store(total + chunk.to(tl.int64) * k + column, sums, mask=column < k)
