"""Between the two layers of an MLP: channels → decode, bias, activation, encode → channels, and back.

The hidden activations never reach memory, neither way: the backward pass computes them again from the channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels.activations import activate, slope
from stl.kernels.tiles import (
    MANY_PROGRAMS,
    Grid,
    Tiling,
    by_column,
    channel_places,
    constants,
    divide,
    divide_for_sums,
    load_basis,
    multiply,
    padded,
    store_column_sums,
    store_product,
    tiles_exist,
)


@triton.jit
def _decoded(
    channels, decoder, shift, p, j, n, m, N, P, M,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """(offsets of channels, which of them exist, coded channels, decoded tiles with bias)."""
    places, exist = channel_places(p, j, P, M, M, R, RP, FULL)
    coded = tl.load(channels + places, mask=exist, other=0.0)
    return places, exist, coded, multiply(tl.trans(decoder), coded, None, PRECISION) + shift


@triton.jit
def _hidden(
    channels, decoder, bias, encoder, output, n, m, N, P, M,
    T: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, RP2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK tiles of ROWS rows of tiles, one row after the other."""
    blocks = tl.cdiv(M, BLOCK)
    chunk = tl.program_id(0) // blocks
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    decode, encode = load_basis(decoder, R, T, RP, TT), load_basis(encoder, R2, T, RP2, TT)
    shift = tl.zeros((TT, BLOCK), tl.float32)
    if BIAS:
        shift = by_column(bias, j, m, T, TT)
    for step in range(ROWS):
        p = chunk * ROWS + step
        _, _, _, tiles = _decoded(
            channels, decode, shift, p, j, n, m, N, P, M, T, R, TT, RP, PRECISION, FULL
        )  # fmt: skip
        exist = tiles_exist(p, j, N, P, n, m, T, TT, FULL)
        values = tl.where(exist, activate(tiles, ACTIVATION, LOW), 0.0)
        encoded = multiply(encode, values.to(output.dtype.element_ty), None, PRECISION)
        places, exist = channel_places(p, j, P, M, M, R2, RP2, FULL)
        tl.store(output + places, encoded.to(output.dtype.element_ty), mask=exist)


@triton.jit
def _hidden_backward(
    channels, decoder, bias, encoder, gradient, dchannels, ddecoder, dencoder, dbias, n, m, N, P, M,
    T: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, RP2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK tiles of ROWS rows of tiles, one row after the other."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK)
    chunk = pid // blocks
    j = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    encode = load_basis(encoder, R2, T, RP2, TT)
    decode = load_basis(decoder, R, T, RP, TT)
    decoder_product = tl.zeros((RP, TT), tl.float32)
    encoder_product = tl.zeros((RP2, TT), tl.float32)
    total = tl.zeros((TT, BLOCK), tl.float32)
    shift = tl.zeros((TT, BLOCK), tl.float32)
    if BIAS:
        shift = by_column(bias, j, m, T, TT)
    for step in range(ROWS):
        p = chunk * ROWS + step
        places, exist, coded, tiles = _decoded(
            channels, decode, shift, p, j, n, m, N, P, M, T, R, TT, RP, PRECISION, FULL
        )  # fmt: skip
        hidden_exist = tiles_exist(p, j, N, P, n, m, T, TT, FULL)
        values = tl.where(hidden_exist, activate(tiles, ACTIVATION, LOW), 0.0).to(coded.dtype)
        places2, exist2 = channel_places(p, j, P, M, M, R2, RP2, FULL)
        dcoded = tl.load(gradient + places2, mask=exist2, other=0.0)
        again = multiply(encode, values, None, PRECISION)
        tl.store(gradient + places2, again.to(gradient.dtype.element_ty), mask=exist2)
        encoder_product = multiply(dcoded, tl.trans(values), encoder_product, PRECISION)
        dtiles = multiply(tl.trans(encode), dcoded, None, PRECISION) * slope(tiles, ACTIVATION, LOW)
        dtiles = tl.where(hidden_exist, dtiles, 0.0)
        total += dtiles
        dtiles = dtiles.to(coded.dtype)
        decoder_product = multiply(coded, tl.trans(dtiles), decoder_product, PRECISION)
        dcoded = multiply(decode, dtiles, None, PRECISION)
        tl.store(dchannels + places, dcoded.to(dchannels.dtype.element_ty), mask=exist)
    store_product(decoder_product, ddecoder, pid, R, T, RP, TT)
    store_product(encoder_product, dencoder, pid, R2, T, RP2, TT)
    if BIAS:
        store_column_sums(total, dbias, chunk, j, m, T, TT)


def hidden(
    channels: Tensor, decoder: Tensor, bias: Tensor | None, encoder: Tensor, activation: str, tiling: Tiling
) -> Tensor:
    """channels (r, P, M), decoder (r, t²), bias (m,), encoder (r', t²) → channels (r', P, M)."""
    output = channels.new_empty(len(encoder), *channels.shape[1:])
    block = 64 if max(len(decoder), len(encoder)) > 32 else 128
    grid = divide(tiling, block, 4 if channels.dtype != torch.float32 else 8, MANY_PROGRAMS, most_rows=16)
    if output.numel():
        with torch.cuda.device_of(channels):
            _hidden[(grid.programs,)](
                channels, decoder, bias, encoder, output, *tiling.sizes(),
                **_constants(decoder, bias, encoder, activation, tiling, channels.dtype, grid),
            )  # fmt: skip
    return output


def hidden_gradient(
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    encoder: Tensor,
    gradient: Tensor,
    activation: str,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient (r', P, M) of what `hidden` gave → in one pass over memory, those of channels (r, P, M) and, in
    float32, of decoder (r, t²), encoder (r', t²) and bias (m,). What `hidden` gave is written over `gradient`."""
    dchannels = torch.empty_like(channels)
    grid = divide_for_sums(tiling, channels.dtype, max(len(decoder), len(encoder)))
    products = [channels.new_empty(grid.programs, *matrix.shape, dtype=torch.float32) for matrix in (decoder, encoder)]
    sums = None if bias is None else channels.new_empty(grid.chunks, tiling.k, dtype=torch.float32)
    if channels.numel():
        with torch.cuda.device_of(channels):
            _hidden_backward[(grid.programs,)](
                channels, decoder, bias, encoder, gradient, dchannels, *products, sums,
                *tiling.sizes(), **_constants(decoder, bias, encoder, activation, tiling, channels.dtype, grid),
            )  # fmt: skip
    ddecoder, dencoder = (product.sum(0) for product in products)
    return dchannels, ddecoder, dencoder, None if sums is None else sums.sum(0)


def _constants(
    decoder: Tensor,
    bias: Tensor | None,
    encoder: Tensor,
    activation: str,
    tiling: Tiling,
    dtype: torch.dtype,
    grid: Grid,
) -> dict[str, Any]:
    return {
        **constants(tiling, len(decoder), dtype, grid),
        "R2": len(encoder),
        "RP2": padded(len(encoder)),
        "BIAS": bias is not None,
        "ACTIVATION": activation,
        "LOW": dtype != torch.float32,
    }
