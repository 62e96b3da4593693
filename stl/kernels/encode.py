"""Tiles to channels: channels[q] = Σ_e matrix[q, e]·tile[e]. The encode of a layer, and the first step of its backward
pass, where the gradient of the output meets the decoder."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels.shares import add_up
from stl.kernels.tiles import (
    MANY_PROGRAMS,
    READ_NEXT,
    Tiling,
    channel_places,
    constants,
    divide,
    divide_for_sums,
    load_basis,
    multiply,
    store_column_sums,
    store_product,
    tile_places,
)


@triton.jit
def _encode(
    x, stride_b, stride_n, stride_k, n, k, N, P, K,
    matrix, channels, others, products, sums,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BESIDE: tl.constexpr,
    PRODUCT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK groups of ROWS rows of tiles, one row after the other."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(BESIDE[0] * K, BLOCK * S)
    chunk = pid // blocks
    j = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    basis = load_basis(matrix, R, T, RP, TT)
    product = tl.zeros((RP, TT), tl.float32)
    total = tl.zeros((TT, BLOCK), tl.float32)
    for step in range(ROWS):
        p = chunk * ROWS + step
        places, exists = tile_places(p, j, N, P, n, k, stride_b, stride_n, stride_k, T, TT, FULL, BESIDE)
        entries = tl.load(x + places, mask=exists, other=0.0)
        tiles = entries.to(matrix.dtype.element_ty)
        places, exists = channel_places(p, j, N, P, K, K, R, RP, S, FULL, BESIDE)
        encoded = multiply(basis, tiles, None, PRECISION)
        tl.store(channels + places, encoded.to(channels.dtype.element_ty), mask=exists, eviction_policy=READ_NEXT)
        if PRODUCT:
            other = tl.load(others + places, mask=exists, other=0.0)
            product = multiply(other, tl.trans(tiles), product, PRECISION)
        if SUM:
            total += entries.to(tl.float32)
    if PRODUCT:
        store_product(product, products, pid, R, T, RP, TT)
    if SUM:
        store_column_sums(total, sums, chunk, j, BESIDE[0] * k, T, TT)


def encode(x: Tensor, matrix: Tensor, tile: int, columns: int) -> Tensor:
    """x (B, n, k), any strides, and matrix (r, t²) → channels (r, P, K) with K = `columns`, zeros from ⌈k/t⌉ on."""
    tiling = Tiling.of(x, tile, columns)
    channels = x.new_empty(len(matrix), tiling.rows, columns)
    _launch(x, tiling, matrix, channels, None, False)
    return channels


def encode_gradient(
    gradient: Tensor, decoder: Tensor, tile: int, channels: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of what `decode` gave, (B, n, m) → those of what it was given, in one pass over memory.

    Returns the gradient of the channels, (r, P, M);
    that of the decoder (r, t²), where the decoded `channels` (r, P, M) are given; that of the bias (m,), where it is
    asked for; all in the precision of the decoder, whatever that of `gradient` is.
    """
    tiling = Tiling.of(gradient, tile)
    dchannels = decoder.new_empty(len(decoder), tiling.rows, tiling.columns)
    return dchannels, *_launch(gradient, tiling, decoder, dchannels, channels, bias)


def _launch(
    x: Tensor, tiling: Tiling, matrix: Tensor, channels: Tensor, others: Tensor | None, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    rank, dtype = len(matrix), matrix.dtype
    sums_nothing = others is None and not bias
    tiling = tiling.in_whole_blocks(128 if sums_nothing else 64, x)
    if sums_nothing:
        grid = divide(tiling, 128, 8 if dtype == torch.float32 else 2, MANY_PROGRAMS, most_rows=1)
        stages = 3
    else:
        grid = divide_for_sums(tiling, dtype, rank)
        stages = 2 if rank <= 32 else 3  # measured: as fast or up to 11 % faster, above 2 to 3 % slower
    products = None if others is None else x.new_empty(grid.programs, *matrix.shape, dtype=torch.float32)
    sums = x.new_empty(grid.chunks * tiling.together, tiling.k, dtype=torch.float32) if bias else None
    if channels.numel():
        with torch.cuda.device_of(x):
            _encode[(grid.programs,)](
                x, *tiling.strides(x), *tiling.sizes(), matrix, channels, others, products, sums,
                **constants(tiling, rank, dtype, grid), PRODUCT=others is not None, SUM=bias, num_stages=stages,
            )  # fmt: skip
    products, sums = (None if shares is None else add_up(shares, dtype) for shares in (products, sums))
    return products, sums
