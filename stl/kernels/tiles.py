"""How a program addresses tiles in a matrix and channels in an encoded one.

Names, here and in the kernels: X (B, n, k) holds tiles of T × T entries, N·K of them in each of its B samples, so that
P = B·N is the number of rows of tiles. Channels are (R, P, K), contiguous, or columns of such. A program holds BLOCK
tiles of one row of tiles p: their entries as (TT, BLOCK), row-major inside a tile, their channels as (RP, BLOCK). TT
and RP are T² and R rounded up to what `tl.dot` takes; the rest is zeros.
"""

from math import ceil, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of a launch. Where each leaves sums behind, those of one warp that a GPU of 132 multiprocessors holds at
# once; else a few times what it holds.
PROGRAMS, MANY_PROGRAMS = 1408, 3200


class Tiling(NamedTuple):
    """The tiles of a matrix (samples, n, k): `columns`, or K, in a row of tiles, those from ⌈k/t⌉ on empty."""

    samples: int
    n: int
    k: int
    tile: int
    columns: int

    @classmethod
    def of(cls, x: Tensor, tile: int, columns: int | None = None) -> "Tiling":
        samples, n, k = x.shape
        return cls(samples, n, k, tile, ceil(k / tile) if columns is None else columns)

    @property
    def rows(self) -> int:
        """P, rows of tiles in all samples."""
        return self.samples * ceil(self.n / self.tile)

    def sizes(self) -> tuple[int, ...]:
        """What the kernels take: n, k, N, P and K."""
        return self.n, self.k, ceil(self.n / self.tile), self.rows, self.columns


def padded(entries: int) -> int:
    """Entries of a vector, rounded up to what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(entries))


def precision(dtype: torch.dtype) -> str:
    """The arithmetic of `multiply`: float32 stays float32, and so does all in the interpreter, which has no bf16."""
    return "ieee" if dtype == torch.float32 or triton.knobs.runtime.interpret else "tf32"


class Grid(NamedTuple):
    """How a launch divides the tiles: each program takes `block` tiles of `rows` rows of tiles, by `warps` warps."""

    block: int
    rows: int
    warps: int
    blocks: int
    chunks: int

    @property
    def programs(self) -> int:
        return self.blocks * self.chunks


def divide(tiling: Tiling, block: int, warps: int, programs: int, most_rows: int = 1024) -> Grid:
    """The grid of a kernel that does well with `block` tiles of 4 × 4 in `warps` warps.

    Of larger tiles as many entries; half of the block and the warps where less of the last block is then empty. As
    many rows one after the other as leave this number of programs, since what a program has loaded serves all of them
    and what it sums is one share; a power of two, since a kernel is compiled for it.
    """
    whole = max(16, block * 16 // padded(tiling.tile**2))  # the least that `tl.dot` takes
    size = min(whole if tiling.columns % whole == 0 else max(16, whole // 2), padded(tiling.columns))
    blocks = ceil(tiling.columns / size)
    rows = min(most_rows, 2 ** int(log2(max(1, tiling.rows * blocks // programs))))
    return Grid(size, rows, max(1, warps * size // whole), blocks, ceil(tiling.rows / rows))


def divide_for_sums(tiling: Tiling, dtype: torch.dtype, rank: int, block: int = 64) -> Grid:
    """The grid of a kernel whose programs each leave a share of a sum behind."""
    return divide(tiling, block, 1 if dtype != torch.float32 and rank <= 32 else 4, PROGRAMS)


def constants(tiling: Tiling, rank: int, dtype: torch.dtype, grid: Grid) -> dict[str, Any]:
    """What a kernel is compiled for. FULL: whether all rows of its programs exist, all entries of the tiles that
    exist, and all tiles of its blocks."""
    entries = tiling.tile**2
    # Products of larger tiles take several steps, and of those by a warp group, which is four warps, ptxas 12.8 has let
    # some read from an address that was never computed.
    most_warps = 2 if entries > 16 and dtype != torch.float32 else grid.warps
    return {
        "T": tiling.tile,
        "R": rank,
        "TT": padded(entries),
        "RP": padded(rank),
        "BLOCK": grid.block,
        "ROWS": grid.rows,
        "PRECISION": precision(dtype),
        "FULL": (
            tiling.n % tiling.tile == 0 and tiling.rows % grid.rows == 0,
            tiling.k == tiling.columns * tiling.tile and entries == padded(entries),
            tiling.columns % grid.block == 0,
        ),
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
    """An encoder or decoder (R, T²) as (RP, TT)."""
    q, e = tl.arange(0, RP)[:, None], tl.arange(0, TT)[None, :]
    return tl.load(matrix + q * (T * T) + e, mask=(q < R) & (e < T * T), other=0.0)


@triton.jit
def tile_places(
    p, j, N, P, n, k, stride_b, stride_n, stride_k, T: tl.constexpr, TT: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Offsets (TT, BLOCK) of the entries of the tiles j in the row of tiles p, and which of them exist."""
    e = tl.arange(0, TT)[:, None]
    row = ((p % N) * T).to(tl.int64) + e // T
    column = j[None, :] * T + e % T
    places = (p // N).to(tl.int64) * stride_b + row * stride_n + column.to(tl.int64) * stride_k
    return places, tiles_exist(p, j, N, P, n, k, T, TT, FULL)


@triton.jit
def tiles_exist(p, j, N, P, n, k, T: tl.constexpr, TT: tl.constexpr, FULL: tl.constexpr):
    """Which entries (TT, BLOCK) exist of the tiles j in the row of tiles p; only what can be false is computed."""
    e = tl.arange(0, TT)[:, None]
    exist = tl.full((TT, j.shape[0]), True, tl.int1)
    if not FULL[0]:
        exist = exist & ((p % N) * T + e // T < n) & (p < P)
    if not FULL[1]:
        exist = exist & (e < T * T) & (j[None, :] * T + e % T < k)
    elif not FULL[2]:
        exist = exist & (j[None, :] * T < k)
    return exist


@triton.jit
def channel_places(p, j, P, K, width, R: tl.constexpr, RP: tl.constexpr, FULL: tl.constexpr):
    """Offsets (RP, BLOCK) of the channels of the tiles j in the row of tiles p, which are `width` from row to row in
    memory, and which of them exist."""
    q = tl.arange(0, RP)[:, None]
    exist = tl.full((RP, j.shape[0]), True, tl.int1)
    if R < RP:
        exist = exist & (q < R)
    if not FULL[0]:
        exist = exist & (p < P)
    if not FULL[2]:
        exist = exist & (j[None, :] < K)
    return (q.to(tl.int64) * P + p) * width + j[None, :], exist


@triton.jit
def by_column(vector, j, k, T: tl.constexpr, TT: tl.constexpr):
    """A number for each of the k features, as float32 (TT, BLOCK); 0 behind the last."""
    column = j[None, :] * T + tl.arange(0, TT)[:, None] % T
    return tl.load(vector + column, mask=column < k, other=0.0).to(tl.float32)


@triton.jit
def store_product(product, total, pid, R: tl.constexpr, T: tl.constexpr, RP: tl.constexpr, TT: tl.constexpr):
    """One program's share (RP, TT) of the gradient of a basis matrix, to total (programs, R, T²)."""
    q, e = tl.arange(0, RP)[:, None], tl.arange(0, TT)[None, :]
    tl.store(total + (pid.to(tl.int64) * R + q) * (T * T) + e, product, mask=(q < R) & (e < T * T))


@triton.jit
def store_column_sums(tiles, total, chunk, j, k, T: tl.constexpr, TT: tl.constexpr):
    """One program's share of the sums over rows, from the sums (TT, BLOCK) of its tiles, to total (chunks, k)."""
    column = j[None, :] * T + tl.arange(0, T)[:, None]
    sums = tl.sum(tl.reshape(tiles, (TT // T, T, tiles.shape[1])), 0)
    tl.store(total + chunk.to(tl.int64) * k + column, sums, mask=column < k)
