"""Channels to tiles: tile[e] = Σ_q matrix[q, e]·channels[q]. The decode of a layer, and the last step of its backward
pass, where the gradient of the channels becomes that of the input."""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels.tiles import (
    Tiling,
    block_size,
    channel_places,
    load_basis,
    most_tiles_and_warps,
    multiply,
    padded,
    precision,
    rows_of_a_program,
    store_product,
    tile_places,
)


@triton.jit
def _decode(
    y, stride_b, stride_n, stride_k, n, k, N, P, K,
    matrix, channels, bias, x, x_b, x_n, x_k, encoded, products,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK tiles of ROWS rows of tiles, one row after the other."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK)
    chunk = pid // blocks
    j = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    basis = load_basis(matrix, R, T, RP, TT)
    product = tl.zeros((RP, TT), tl.float32)
    for step in range(ROWS):
        p = (chunk * ROWS + step).to(tl.int64)
        places, exist = channel_places(p, j, P, K, R, RP)
        coded = tl.load(channels + places, mask=exist, other=0.0)
        tiles = multiply(tl.trans(basis), coded, None, PRECISION)
        if BIAS:
            column = j[None, :] * T + tl.arange(0, TT)[:, None] % T
            tiles += tl.load(bias + column, mask=column < k, other=0.0).to(tl.float32)
        y_places, y_exist = tile_places(p, j, N, n, k, P, stride_b, stride_n, stride_k, T, TT)
        tl.store(y + y_places, tiles.to(y.dtype.element_ty), mask=y_exist)
        if INPUT:
            x_places, x_exist = tile_places(p, j, N, n, k, P, x_b, x_n, x_k, T, TT)
            inputs = tl.load(x + x_places, mask=x_exist, other=0.0)
            again = multiply(basis, inputs, None, PRECISION)
            tl.store(encoded + places, again.to(encoded.dtype.element_ty), mask=exist)
            product = multiply(coded, tl.trans(inputs), product, PRECISION)
    if INPUT:
        store_product(product, products, pid, R, T, RP, TT)


def decode(channels: Tensor, matrix: Tensor, y: Tensor, tile: int, bias: Tensor | None = None) -> None:
    """channels (r, P, M), matrix (r, t²) and bias (m,) → into y (B, n, m), any strides."""
    _launch(channels, matrix, y, tile, bias, None)


def decode_gradient(gradient: Tensor, encoder: Tensor, x: Tensor, dx: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The gradient (r, P, K) of what `encode` gave for x (B, n, k) → those of what it was given, in one pass.

    The input's is written to dx (B, n, k). Returns x encoded again, (r, P, K), and the gradient of the encoder, float32
    (r, t²).
    """
    encoded, products = _launch(gradient, encoder, dx, tile, None, x)
    assert encoded is not None
    assert products is not None
    return encoded, products


def _launch(
    channels: Tensor, matrix: Tensor, y: Tensor, tile: int, bias: Tensor | None, x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    rank, tiling = len(matrix), Tiling(y.shape[0], y.shape[1], y.shape[2], tile)
    most, warps = most_tiles_and_warps(y.dtype, x is not None)
    block = block_size(tiling.columns, most)
    blocks = ceil(tiling.columns / block)
    rows = 1 if x is None else rows_of_a_program(tiling.rows, blocks)
    chunks = ceil(tiling.rows / rows)
    encoded = products = None
    if x is not None:
        encoded = torch.empty_like(channels)
        products = x.new_empty(chunks * blocks, rank, tile**2, dtype=torch.float32)
    if y.numel():
        with torch.cuda.device_of(y):
            _decode[(chunks * blocks,)](
                y, *y.stride(), *tiling.sizes(), matrix, channels, bias, x, *(0, 0, 0) if x is None else x.stride(),
                encoded, products,
                T=tile, R=rank, TT=padded(tile**2), RP=padded(rank), BLOCK=block, ROWS=rows,
                PRECISION=precision(y.dtype), BIAS=bias is not None, INPUT=x is not None, num_warps=warps,
            )  # fmt: skip
    return encoded, None if products is None else products.sum(0)
