"""A whole narrow layer in one pass over memory: encode, products and decode, with an activation or an addition behind.

Neither encoded tiles nor channels reach memory in the forward pass; the backward pass computes both again from x. A
program holds ROWS rows of tiles, all channels of all their outputs, and, one block after the other, those of its
inputs. Every program reads the whole encoded weight, so that it pays while that is small.
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
MOST_CHANNELS = 512  # of a row of tiles, with what is padded; they stay in registers


def is_narrow(dtype: torch.dtype, tile: int, shape: Sequence[int]) -> bool:
    """Whether a layer with an encoded weight of this shape (r, K, M) is computed here: in 16 bits, where it is so small
    that one pass is the faster one, and spills little; in the interpreter, which has no bf16, in float32 as well."""
    rank, K, M = shape
    fits = K % LEAST == 0 and 0 < M <= LEAST and padded(rank) * max(K, LEAST) <= MOST_CHANNELS
    return tile == TILE and fits and (dtype != torch.float32 or INTERPRETED)


@triton.jit
def _load_weight(weight, step, K, M, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr):
    """Of the encoded weight, what the block of inputs `step` meets: (RP, BLOCK, OUT)."""
    q = tl.arange(0, RP)[:, None, None]
    i = step * BLOCK + tl.arange(0, BLOCK)[None, :, None]
    j = tl.arange(0, OUT)[None, None, :]
    return tl.load(weight + (q * K + i) * M + j, mask=(q < R) & (i < K) & (j < M), other=0.0)


@triton.jit
def _coded(
    x, stride_b, stride_n, stride_k, n, k, N, P, K, M, first, encoder, weight, encoded,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Channels (RP, ROWS·OUT) of the rows of tiles from `first` on, in x's precision; KEEP: x encoded is kept."""
    column = tl.arange(0, ROWS * BLOCK)
    p = (first + column // BLOCK)[None, :]
    channels = tl.zeros((RP, ROWS, OUT), tl.float32)
    for step in range(STEPS):
        j = step * BLOCK + column % BLOCK
        places, exist = tile_places(p, j, N, P, n, k, stride_b, stride_n, stride_k, T, TT, FULL)
        tiles = tl.load(x + places, mask=exist, other=0.0)
        coded = multiply(encoder, tiles, None, PRECISION).to(tiles.dtype)
        if KEEP:
            places, exist = channel_places(p, j, P, K, K, R, RP, 1, FULL)
            tl.store(encoded + places, coded, mask=exist)
        block = _load_weight(weight, step, K, M, R, RP, BLOCK, OUT)
        channels = multiply(tl.reshape(coded, (RP, ROWS, BLOCK)), block, channels, PRECISION)
    return tl.reshape(channels.to(x.dtype.element_ty), (RP, ROWS * OUT))


@triton.jit
def _narrow(
    x, x_b, x_n, x_k, n, k, m, N, P, K, M, encoder, weight, decoder, bias,
    residual, residual_b, residual_n, residual_k, y, y_b, y_n, y_k,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, FULL_OUT: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LOW: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of tiles."""
    first = tl.program_id(0) * ROWS
    encode, decode = load_basis(encoder, R, T, RP, TT), load_basis(decoder, R, T, RP, TT)
    coded = _coded(
        x, x_b, x_n, x_k, n, k, N, P, K, M, first, encode, weight, None,
        T, R, TT, RP, ROWS, BLOCK, STEPS, OUT, PRECISION, FULL, False,
    )  # fmt: skip
    column = tl.arange(0, ROWS * OUT)
    p, j = (first + column // OUT)[None, :], column % OUT
    result = multiply(tl.trans(decode), coded, None, PRECISION)
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
def _to_inputs(
    dchannels, x, x_b, x_n, x_k, dx, dx_b, dx_n, dx_k, n, k, N, P, K, M, first, step, encoder, weight, product,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OUT: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of the block of inputs `step`, to dx, from that of the channels (RP, ROWS, OUT); returns the sum
    `product` with what the encoder's gradient has of it."""
    column = tl.arange(0, ROWS * BLOCK)
    p, j = (first + column // BLOCK)[None, :], step * BLOCK + column % BLOCK
    block = tl.permute(_load_weight(weight, step, K, M, R, RP, BLOCK, OUT), (0, 2, 1))
    coded = multiply(dchannels, block, None, PRECISION).to(dchannels.dtype)
    coded = tl.reshape(coded, (RP, ROWS * BLOCK))
    places, exist = tile_places(p, j, N, P, n, k, x_b, x_n, x_k, T, TT, FULL)
    tiles = tl.load(x + places, mask=exist, other=0.0)
    result = multiply(tl.trans(encoder), coded, None, PRECISION)
    places, exist = tile_places(p, j, N, P, n, k, dx_b, dx_n, dx_k, T, TT, FULL)
    tl.store(dx + places, result.to(dx.dtype.element_ty), mask=exist)
    return _add_product(coded, tiles, product, PRECISION)


@triton.jit
def _narrow_backward(
    gradient, g_b, g_n, g_k, x, x_b, x_n, x_k, n, k, m, N, P, K, M, encoder, weight, decoder, bias,
    dx, dx_b, dx_n, dx_k, encoded, dchannels, dencoder, ddecoder, dbias,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, FULL_OUT: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LOW: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of tiles CHUNK times, one after the other."""
    pid = tl.program_id(0)
    encode, decode = load_basis(encoder, R, T, RP, TT), load_basis(decoder, R, T, RP, TT)
    encoder_product = tl.zeros((PARTS, RP, TT), tl.float32)
    decoder_product = tl.zeros((PARTS, RP, TT), tl.float32)
    total = tl.zeros((TT, ROWS * OUT), tl.float32)
    column = tl.arange(0, ROWS * OUT)
    j = column % OUT
    for chunk in range(CHUNK):
        first = (pid * CHUNK + chunk) * ROWS
        coded = _coded(
            x, x_b, x_n, x_k, n, k, N, P, K, M, first, encode, weight, encoded,
            T, R, TT, RP, ROWS, BLOCK, STEPS, OUT, PRECISION, FULL, True,
        )  # fmt: skip
        p = (first + column // OUT)[None, :]
        places, exist = tile_places(p, j, N, P, n, m, g_b, g_n, g_k, T, TT, FULL_OUT)
        dtiles = tl.load(gradient + places, mask=exist, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            inner = multiply(tl.trans(decode), coded, None, PRECISION)
            if BIAS:
                inner += by_column(bias, j, m, T, TT)
            dtiles *= slope(inner, ACTIVATION, LOW)
        if BIAS:
            total += dtiles
        dtiles = dtiles.to(coded.dtype)
        decoder_product = _add_product(coded, dtiles, decoder_product, PRECISION)
        dcoded = multiply(decode, dtiles, None, PRECISION).to(coded.dtype)
        places, exist = channel_places(p, j, P, M, M, R, RP, 1, FULL_OUT)
        tl.store(dchannels + places, dcoded, mask=exist)
        dcoded = tl.reshape(dcoded, (RP, ROWS, OUT))
        for step in range(STEPS):
            encoder_product = _to_inputs(
                dcoded, x, x_b, x_n, x_k, dx, dx_b, dx_n, dx_k, n, k, N, P, K, M, first, step, encode, weight,
                encoder_product, T, R, TT, RP, ROWS, BLOCK, OUT, PRECISION, FULL,
            )  # fmt: skip
    store_product(tl.sum(encoder_product, 0), dencoder, pid, R, T, RP, TT)
    store_product(tl.sum(decoder_product, 0), ddecoder, pid, R, T, RP, TT)
    if BIAS:
        sums = tl.sum(tl.reshape(total, (TT, ROWS, OUT)), 1)
        store_column_sums(sums, dbias, pid, tl.arange(0, OUT), m, T, TT)


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
    out = padded(after.columns)
    weight, encoder, _, bias = layer
    return {
        "T": TILE,
        "R": len(encoder),
        "TT": TILE**2,
        "RP": padded(len(encoder)),
        "BLOCK": LEAST,
        "STEPS": triton.cdiv(before.columns, LEAST),
        "OUT": out,
        "PRECISION": precision(weight.dtype),
        "FULL": before.full(rows, LEAST),
        "FULL_OUT": after.full(rows, out),
        "BIAS": bias is not None,
        "ACTIVATION": activation,
        "LOW": weight.dtype != torch.float32,
        "num_stages": 2,
    }
