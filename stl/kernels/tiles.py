"""How a program addresses tiles in a matrix and channels in an encoded one.

Names, here and in the kernels: X (B, n, k) holds tiles of T × T entries, N·K of them in each of its B samples, so that
P = B·N is the number of rows of tiles. Channels are (R, P, K), contiguous. A program holds BLOCK tiles of one row of
tiles p: their entries as (TT, BLOCK), row-major inside a tile, their channels as (RP, BLOCK). TT and RP are T² and R
rounded up to what `tl.dot` takes; the rest is zeros.
"""

from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl

PROGRAMS = 4096  # of a launch that leaves sums behind: about eight on each multiprocessor at a time, a few times over


class Tiling(NamedTuple):
    """The tiles of a matrix (samples, n, k)."""

    samples: int
    n: int
    k: int
    tile: int

    @property
    def rows(self) -> int:
        """P, rows of tiles in all samples."""
        return self.samples * ceil(self.n / self.tile)

    @property
    def columns(self) -> int:
        """K, tiles in a row of tiles."""
        return ceil(self.k / self.tile)

    def sizes(self) -> tuple[int, ...]:
        """What the kernels take: n, k, N, P and K."""
        return self.n, self.k, ceil(self.n / self.tile), self.rows, self.columns


def padded(entries: int) -> int:
    """Entries of a vector, rounded up to what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(entries))


def precision(dtype: torch.dtype) -> str:
    """The arithmetic of `multiply`: float32 stays float32, and so does all in the interpreter, which has no bf16."""
    return "ieee" if dtype == torch.float32 or triton.knobs.runtime.interpret else "tf32"


def block_size(columns: int, most: int) -> int:
    """Tiles that a program takes of a row of tiles: as many as its kernel does well with, or all."""
    return min(most, padded(columns))


def most_tiles_and_warps(dtype: torch.dtype, sums: bool) -> tuple[int, int]:
    """Of a program that encodes or decodes; float32 products and `sums` need the registers of more warps."""
    if sums:
        return 64, 4
    return 128, 4 if dtype == torch.float32 else 2


def rows_of_a_program(rows: int, blocks: int) -> int:
    """Rows of tiles that a program takes where each leaves a partial sum behind: few sums, and enough programs."""
    return max(1, rows * blocks // PROGRAMS)


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
def tile_places(p, j, N, n, k, P, stride_b, stride_n, stride_k, T: tl.constexpr, TT: tl.constexpr):
    """Offsets (TT, BLOCK) of the entries of the tiles j in the row of tiles p, and which of them exist."""
    e = tl.arange(0, TT)[:, None]
    row = (p % N) * T + e // T
    column = j[None, :] * T + e % T
    exists = (e < T * T) & (row < n) & (column < k) & (p < P)
    return (p // N) * stride_b + row * stride_n + column.to(tl.int64) * stride_k, exists


@triton.jit
def channel_places(p, j, P, K, R: tl.constexpr, RP: tl.constexpr):
    """Offsets (RP, BLOCK) of the channels of the tiles j in the row of tiles p, and which of them exist."""
    q = tl.arange(0, RP)[:, None]
    return (q * P + p) * K + j[None, :], (q < R) & (j[None, :] < K) & (p < P)


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
