"""Channels to tiles: tile[e] = Σ_q matrix[q, e]·channels[q]. The decode of a layer, which adds a residual as it
writes, and the last step of its backward pass, where the gradient of the channels becomes that of the input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels.shares import add_up
from stl.kernels.tiles import (
    MANY_PROGRAMS,
    Tiling,
    by_column,
    channel_places,
    constants,
    divide,
    divide_for_sums,
    load_basis,
    multiply,
    own_groups,
    store_product,
    tile_places,
)


@triton.jit
def _decode(
    y, stride_b, stride_n, stride_k, n, k, N, P, K,
    matrix, channels, bias, x, x_b, x_n, x_k, products,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    INPUT: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK groups of ROWS rows of tiles, one row after the other. x, of y's shape, is what is
    added to y (RESIDUAL), or what is encoded again (INPUT)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(BESIDE[0] * K, BLOCK * S)
    chunk = pid // blocks
    j = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    basis = load_basis(matrix, R, T, RP, TT)
    product = tl.zeros((RP, TT), tl.float32)
    shift = tl.zeros((TT, BLOCK), tl.float32)
    if BIAS:
        shift = by_column(bias, own_groups(j, BESIDE), k, T, TT)
    for step in range(ROWS):
        p = chunk * ROWS + step
        places, exist = channel_places(p, j, N, P, K, K, R, RP, S, FULL, BESIDE)
        coded = tl.load(channels + places, mask=exist, other=0.0)
        tiles = multiply(tl.trans(basis), coded, None, PRECISION)
        if BIAS:
            tiles += shift
        if RESIDUAL:
            x_places, x_exist = tile_places(p, j, N, P, n, k, x_b, x_n, x_k, T, TT, FULL, BESIDE)
            tiles += tl.load(x + x_places, mask=x_exist, other=0.0).to(tl.float32)
        y_places, y_exist = tile_places(p, j, N, P, n, k, stride_b, stride_n, stride_k, T, TT, FULL, BESIDE)
        tl.store(y + y_places, tiles.to(y.dtype.element_ty), mask=y_exist)
        if INPUT:
            x_places, x_exist = tile_places(p, j, N, P, n, k, x_b, x_n, x_k, T, TT, FULL, BESIDE)
            inputs = tl.load(x + x_places, mask=x_exist, other=0.0)
            again = multiply(basis, inputs, None, PRECISION)
            tl.store(channels + places, again.to(channels.dtype.element_ty), mask=exist)  # `coded` has been read
            product = multiply(coded, tl.trans(inputs), product, PRECISION)
    if INPUT:
        store_product(product, products, pid, R, T, RP, TT)


def decode(
    channels: Tensor, matrix: Tensor, y: Tensor, tile: int, bias: Tensor | None, residual: Tensor | None
) -> None:
    """channels (r, P, M), matrix (r, t²), bias (m,) and residual (B, n, m) → into y (B, n, m), both of any strides and
    precision."""
    _launch(channels, matrix, y, tile, bias, residual, again=False)


def decode_gradient(gradient: Tensor, encoder: Tensor, x: Tensor, dx: Tensor, tile: int) -> Tensor:
    """The gradient (r, P, K) of what `encode` gave for x (B, n, k) → those of what it was given, in one pass.

    The input's is written to dx (B, n, k), and over `gradient` x encoded again. Returns that of the encoder (r, t²).
    """
    products = _launch(gradient, encoder, dx, tile, None, x, again=True)
    assert products is not None
    return products


def _launch(
    channels: Tensor, matrix: Tensor, y: Tensor, tile: int, bias: Tensor | None, x: Tensor | None, again: bool
) -> Tensor | None:
    rank, dtype = len(matrix), channels.dtype
    block = 128 if x is None else 64  # what is read beside the channels takes registers as well
    tiling = Tiling.of(y, tile, channels.shape[2]).in_whole_blocks(block, y, x)
    if again:
        grid = divide_for_sums(tiling, dtype, rank)
    else:
        tiles_of_a_warp = 16 if dtype == torch.float32 else 64
        grid = divide(tiling, block, block // tiles_of_a_warp, MANY_PROGRAMS, most_rows=4)
    products = channels.new_empty(grid.programs, *matrix.shape, dtype=torch.float32) if again else None
    if y.numel():
        with torch.cuda.device_of(y):
            _decode[(grid.programs,)](
                y, *tiling.strides(y), *tiling.sizes(), matrix, channels, bias,
                x, *tiling.strides(x), products,
                **constants(tiling, rank, dtype, grid), BIAS=bias is not None,
                RESIDUAL=x is not None and not again, INPUT=again,
            )  # fmt: skip
    return None if products is None else add_up(products, matrix.dtype)
