"""A whole narrow layer in one pass over memory: encode, products and decode, with an activation or an addition behind.

Neither encoded tiles nor channels reach memory in the forward pass; the backward pass computes both again from x. A
program holds ROWS rows of tiles, at most BLOCK in a row on either side, with all their channels, and the whole encoded
weight.
"""

from collections.abc import Sequence
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels import INTERPRETED
from stl.kernels.activations import activate, slope
from stl.kernels.operators import Layer
from stl.kernels.shares import add_up
from stl.kernels.tiles import (
    LEAST,
    PROGRAMS,
    Tiling,
    by_column,
    channel_places,
    load_basis,
    multiply,
    padded,
    precision,
    store_column_sums,
    store_product,
    tile_places,
)
from stl.kernels.weight_gradient import weight_gradient

ROWS, WARPS = 32, 8  # of tiles, that a program takes at once, and its warps
ROWS_OF_TRAINING, WARPS_OF_TRAINING = 16, 4
TILE = 4  # whose 16 entries `tl.dot` takes; smaller ones would have to be grouped, larger ones take more registers
MOST_RANK, BLOCK = 32, LEAST


def is_narrow(dtype: torch.dtype, tile: int, shape: Sequence[int]) -> bool:
    """Whether a layer with an encoded weight of this shape (r, K, M) is computed here: with whole blocks of tiles, for
    which it was measured and spills little, in 16 bits; in the interpreter, which has no bf16, in float32 as well."""
    rank, *tiles = shape
    fits = rank <= MOST_RANK and tiles == [BLOCK, BLOCK]
    return tile == TILE and fits and (dtype != torch.float32 or INTERPRETED)


@triton.jit
def _load_weight(weight, K, M, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr):
    """The encoded weight (R, K, M) as (RP, BLOCK, BLOCK)."""
    q = tl.arange(0, RP)[:, None, None]
    i, j = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    return tl.load(weight + (q * K + i) * M + j, mask=(q < R) & (i < K) & (j < M), other=0.0)


@triton.jit
def _narrow(
    x, x_b, x_n, x_k, n, k, m, N, P, K, M, encoder, weight, decoder, bias,
    residual, residual_b, residual_n, residual_k, y, y_b, y_n, y_k,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, FULL_OUT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    LOW: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of tiles."""
    column = tl.arange(0, ROWS * BLOCK)
    p, j = (tl.program_id(0) * ROWS + column // BLOCK)[None, :], column % BLOCK
    encode, decode = load_basis(encoder, R, T, RP, TT), load_basis(decoder, R, T, RP, TT)
    matrices = _load_weight(weight, K, M, R, RP, BLOCK)
    places, exist = tile_places(p, j, N, P, n, k, x_b, x_n, x_k, T, TT, FULL)
    coded = multiply(encode, tl.load(x + places, mask=exist, other=0.0), None, PRECISION).to(x.dtype.element_ty)
    channels = multiply(tl.reshape(coded, (RP, ROWS, BLOCK)), matrices, None, PRECISION).to(coded.dtype)
    result = multiply(tl.trans(decode), tl.reshape(channels, (RP, ROWS * BLOCK)), None, PRECISION)
    if BIAS:
        result += by_column(bias, j, m, T, TT)
    if ACTIVATION != "":
        result = activate(result, ACTIVATION, LOW)
    if RESIDUAL:
        places, exist = tile_places(p, j, N, P, n, m, residual_b, residual_n, residual_k, T, TT, FULL_OUT)
        result += tl.load(residual + places, mask=exist, other=0.0).to(tl.float32)
    places, exist = tile_places(p, j, N, P, n, m, y_b, y_n, y_k, T, TT, FULL_OUT)
    tl.store(y + places, result.to(y.dtype.element_ty), mask=exist)


@triton.jit
def _add_product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ bᵀ for a (RP, C) and b (TT, C), in parts (PARTS, RP, TT) that are still to be added up: a product so
    small keeps one warp busy, and others would compute it again."""
    PARTS: tl.constexpr = total.shape[0]
    part: tl.constexpr = a.shape[1] // PARTS
    a = tl.permute(tl.reshape(a, (a.shape[0], PARTS, part)), (1, 0, 2))
    b = tl.permute(tl.reshape(b, (b.shape[0], PARTS, part)), (1, 2, 0))
    return multiply(a, b, total, PRECISION)


@triton.jit
def _narrow_backward(
    gradient, g_b, g_n, g_k, x, x_b, x_n, x_k, n, k, m, N, P, K, M, encoder, weight, decoder, bias,
    dx, dx_b, dx_n, dx_k, encoded, dchannels, dencoder, ddecoder, dbias,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, FULL_OUT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    LOW: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of tiles CHUNK times, one after the other."""
    pid = tl.program_id(0)
    encode, decode = load_basis(encoder, R, T, RP, TT), load_basis(decoder, R, T, RP, TT)
    encoder_product = tl.zeros((PARTS, RP, TT), tl.float32)
    decoder_product = tl.zeros((PARTS, RP, TT), tl.float32)
    total = tl.zeros((TT, ROWS * BLOCK), tl.float32)
    column = tl.arange(0, ROWS * BLOCK)
    j = column % BLOCK
    for chunk in range(CHUNK):
        p = ((pid * CHUNK + chunk) * ROWS + column // BLOCK)[None, :]
        matrices = _load_weight(weight, K, M, R, RP, BLOCK)
        places, exist = tile_places(p, j, N, P, n, k, x_b, x_n, x_k, T, TT, FULL)
        tiles = tl.load(x + places, mask=exist, other=0.0)
        coded = multiply(encode, tiles, None, PRECISION).to(tiles.dtype)
        places, exist = channel_places(p, j, P, K, K, R, RP, 1, FULL)
        tl.store(encoded + places, coded, mask=exist)
        channels = multiply(tl.reshape(coded, (RP, ROWS, BLOCK)), matrices, None, PRECISION).to(tiles.dtype)
        channels = tl.reshape(channels, (RP, ROWS * BLOCK))
        places, exist = tile_places(p, j, N, P, n, m, g_b, g_n, g_k, T, TT, FULL_OUT)
        dtiles = tl.load(gradient + places, mask=exist, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            inner = multiply(tl.trans(decode), channels, None, PRECISION)
            if BIAS:
                inner += by_column(bias, j, m, T, TT)
            dtiles *= slope(inner, ACTIVATION, LOW)
        if BIAS:
            total += dtiles
        dtiles = dtiles.to(tiles.dtype)
        decoder_product = _add_product(channels, dtiles, decoder_product, PRECISION)
        dcoded = multiply(decode, dtiles, None, PRECISION).to(tiles.dtype)
        places, exist = channel_places(p, j, P, M, M, R, RP, 1, FULL_OUT)
        tl.store(dchannels + places, dcoded, mask=exist)
        # The weight and the tiles are loaded once more: held until here, they would spill.
        matrices = tl.permute(_load_weight(weight, K, M, R, RP, BLOCK), (0, 2, 1))
        dcoded = multiply(tl.reshape(dcoded, (RP, ROWS, BLOCK)), matrices, None, PRECISION).to(tiles.dtype)
        dcoded = tl.reshape(dcoded, (RP, ROWS * BLOCK))
        result = multiply(tl.trans(encode), dcoded, None, PRECISION)
        places, exist = tile_places(p, j, N, P, n, k, dx_b, dx_n, dx_k, T, TT, FULL)
        tl.store(dx + places, result.to(dx.dtype.element_ty), mask=exist)
        places, exist = tile_places(p, j, N, P, n, k, x_b, x_n, x_k, T, TT, FULL)
        tiles = tl.load(x + places, mask=exist, other=0.0)
        encoder_product = _add_product(dcoded, tiles, encoder_product, PRECISION)
    store_product(tl.sum(encoder_product, 0), dencoder, pid, R, T, RP, TT)
    store_product(tl.sum(decoder_product, 0), ddecoder, pid, R, T, RP, TT)
    if BIAS:
        sums = tl.sum(tl.reshape(total, (TT, ROWS, BLOCK)), 1)
        store_column_sums(sums, dbias, pid, tl.arange(0, BLOCK), m, T, TT)


def narrow(x: Tensor, layer: Layer, y: Tensor, residual: Tensor | None, activation: str) -> None:
    """x (B, n, k) → into y (B, n, m) activation(layer(x)) + residual, all three of any strides; the parameters of the
    layer are contiguous."""
    tiling = Tiling.of(x, TILE)
    weight, encoder, decoder, bias = layer
    if y.numel():
        with torch.cuda.device_of(y):
            _narrow[(triton.cdiv(tiling.rows, ROWS),)](
                x, *x.stride(), *_sizes(tiling, y, weight), encoder, weight, decoder, bias,
                residual, *(0, 0, 0) if residual is None else residual.stride(), y, *y.stride(),
                **_constants(tiling, Tiling.of(y, TILE), layer, activation, ROWS),
                ROWS=ROWS, RESIDUAL=residual is not None, num_warps=WARPS,
            )  # fmt: skip


def narrow_gradient(
    gradient: Tensor, x: Tensor, layer: Layer, dx: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient (B, n, m) of what `narrow` gave → those of weight, encoder, decoder and bias, and of x into dx."""
    tiling = Tiling.of(x, TILE)
    weight, encoder, decoder, bias = layer
    rank, K, M = weight.shape
    rows = ROWS_OF_TRAINING
    chunk = 2 ** int(log2(max(1, tiling.rows // (rows * PROGRAMS))))  # a kernel is compiled for it
    programs = triton.cdiv(tiling.rows, rows * chunk)
    encoded, dchannels = (x.new_empty(rank, tiling.rows, columns) for columns in (K, M))
    dencoder, ddecoder = (x.new_empty(programs, *encoder.shape, dtype=torch.float32) for _ in range(2))
    dbias = None if bias is None else x.new_empty(programs, len(bias), dtype=torch.float32)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            _narrow_backward[(programs,)](
                gradient, *gradient.stride(), x, *x.stride(), *_sizes(tiling, gradient, weight), encoder, weight,
                decoder, bias, dx, *dx.stride(), encoded, dchannels, dencoder, ddecoder, dbias,
                **_constants(tiling, Tiling.of(gradient, TILE), layer, activation, rows * chunk),
                ROWS=rows, CHUNK=chunk, PARTS=WARPS_OF_TRAINING, num_warps=WARPS_OF_TRAINING,
            )  # fmt: skip
    matrices = add_up(dencoder, x.dtype), add_up(ddecoder, x.dtype)
    return weight_gradient(encoded, dchannels), *matrices, None if dbias is None else add_up(dbias, x.dtype)


def _sizes(tiling: Tiling, y: Tensor, weight: Tensor) -> tuple[int, ...]:
    """What the kernels take: n, k, m, N, P, K and M."""
    n, k, N, P, K = tiling.sizes()
    return n, k, y.shape[2], N, P, K, weight.shape[2]


def _constants(before: Tiling, after: Tiling, layer: Layer, activation: str, rows: int) -> dict[str, Any]:
    """What both kernels are compiled for, if a program takes so many rows of tiles in all."""
    weight, encoder, _, bias = layer
    return {
        "T": TILE,
        "R": len(encoder),
        "TT": TILE**2,
        "RP": padded(len(encoder)),
        "BLOCK": BLOCK,
        "PRECISION": precision(weight.dtype),
        "FULL": before.full(rows, BLOCK),
        "FULL_OUT": after.full(rows, BLOCK),
        "BIAS": bias is not None,
        "ACTIVATION": activation,
        "LOW": weight.dtype != torch.float32,
        "num_stages": 2,
    }
