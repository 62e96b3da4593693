"""Between the two layers of an MLP: channels → decode, bias, activation, encode → channels, and back.

The hidden activations never reach memory, neither way: the backward pass computes them again from the channels.
"""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels.activations import activate, slope
from stl.kernels.tiles import (
    Tiling,
    block_size,
    channel_places,
    load_basis,
    multiply,
    padded,
    precision,
    rows_of_a_program,
    store_column_sums,
    store_product,
)


@triton.jit
def _hidden_tiles(
    channels, decoder, bias, p, j, n, m, N, P, M,
    T: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(coded channels, decoded tiles with bias, which of their entries exist)."""
    places, exist = channel_places(p, j, P, M, R, RP)
    coded = tl.load(channels + places, mask=exist, other=0.0)
    tiles = multiply(tl.trans(load_basis(decoder, R, T, RP, TT)), coded, None, PRECISION)
    e = tl.arange(0, TT)[:, None]
    column = j[None, :] * T + e % T
    if BIAS:
        tiles += tl.load(bias + column, mask=column < m, other=0.0).to(tl.float32)
    return coded, tiles, (e < T * T) & ((p % N) * T + e // T < n) & (column < m) & (p < P)


@triton.jit
def _hidden(
    channels, decoder, bias, encoder, output, n, m, N, P, M,
    T: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, RP2: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK)
    p = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    _, tiles, exist = _hidden_tiles(channels, decoder, bias, p, j, n, m, N, P, M, T, R, TT, RP, PRECISION, BIAS)
    hidden = tl.where(exist, activate(tiles, ACTIVATION), 0.0).to(output.dtype.element_ty)
    encoded = multiply(load_basis(encoder, R2, T, RP2, TT), hidden, None, PRECISION)
    places, exist = channel_places(p, j, P, M, R2, RP2)
    tl.store(output + places, encoded.to(output.dtype.element_ty), mask=exist)


@triton.jit
def _hidden_backward(
    channels, decoder, bias, encoder, gradient, dchannels, encoded, ddecoder, dencoder, dbias, n, m, N, P, M,
    T: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, RP2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
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
    for step in range(ROWS):
        p = (chunk * ROWS + step).to(tl.int64)
        coded, tiles, exist = _hidden_tiles(
            channels, decoder, bias, p, j, n, m, N, P, M, T, R, TT, RP, PRECISION, BIAS
        )  # fmt: skip
        hidden = tl.where(exist, activate(tiles, ACTIVATION), 0.0).to(coded.dtype)
        places, exist2 = channel_places(p, j, P, M, R2, RP2)
        again = multiply(encode, hidden, None, PRECISION)
        tl.store(encoded + places, again.to(encoded.dtype.element_ty), mask=exist2)
        dcoded = tl.load(gradient + places, mask=exist2, other=0.0)
        encoder_product = multiply(dcoded, tl.trans(hidden), encoder_product, PRECISION)
        dhidden = multiply(tl.trans(encode), dcoded, None, PRECISION)
        dtiles = tl.where(exist, dhidden * slope(tiles, ACTIVATION), 0.0)
        total += dtiles
        dtiles = dtiles.to(coded.dtype)
        decoder_product = multiply(coded, tl.trans(dtiles), decoder_product, PRECISION)
        places, exist = channel_places(p, j, P, M, R, RP)
        tl.store(
            dchannels + places,
            multiply(decode, dtiles, None, PRECISION).to(dchannels.dtype.element_ty),
            mask=exist,
        )
    store_product(decoder_product, ddecoder, pid, R, T, RP, TT)
    store_product(encoder_product, dencoder, pid, R2, T, RP2, TT)
    if BIAS:
        store_column_sums(total, dbias, chunk, j, m, T, TT)


def hidden(
    channels: Tensor, decoder: Tensor, bias: Tensor | None, encoder: Tensor, activation: str, tiling: Tiling
) -> Tensor:
    """channels (r, P, M), decoder (r, t²), bias (m,), encoder (r', t²) → channels (r', P, M)."""
    output = channels.new_empty(len(encoder), *channels.shape[1:])
    block = block_size(tiling.columns, 64 if max(len(decoder), len(encoder)) > 32 else 128)
    if output.numel():
        with torch.cuda.device_of(channels):
            _hidden[(tiling.rows * ceil(tiling.columns / block),)](
                channels, decoder, bias, encoder, output, *tiling.sizes(),
                **_constants(decoder, bias, encoder, activation, tiling.tile, channels.dtype, block),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient (r', P, M) of what `hidden` gave → in one pass over memory, those of channels (r, P, M) and, in
    float32, of decoder (r, t²), encoder (r', t²) and bias (m,); and, as the second, its output again (r', P, M)."""
    dchannels, encoded = torch.empty_like(channels), torch.empty_like(gradient)
    block = block_size(tiling.columns, 64)
    blocks = ceil(tiling.columns / block)
    rows = rows_of_a_program(tiling.rows, blocks)
    chunks = ceil(tiling.rows / rows)
    products = [
        channels.new_empty(chunks * blocks, *matrix.shape, dtype=torch.float32) for matrix in (decoder, encoder)
    ]
    sums = None if bias is None else channels.new_empty(chunks, tiling.k, dtype=torch.float32)
    if channels.numel():
        with torch.cuda.device_of(channels):
            _hidden_backward[(chunks * blocks,)](
                channels, decoder, bias, encoder, gradient, dchannels, encoded, *products, sums, *tiling.sizes(),
                ROWS=rows, **_constants(decoder, bias, encoder, activation, tiling.tile, channels.dtype, block),
            )  # fmt: skip
    ddecoder, dencoder = (product.sum(0) for product in products)
    return dchannels, encoded, ddecoder, dencoder, None if sums is None else sums.sum(0)


def _constants(
    decoder: Tensor, bias: Tensor | None, encoder: Tensor, activation: str, tile: int, dtype: torch.dtype, block: int
) -> dict[str, int | str | bool]:
    ranks = {"R": len(decoder), "RP": padded(len(decoder)), "R2": len(encoder), "RP2": padded(len(encoder))}
    return {
        **ranks,
        "T": tile,
        "TT": padded(tile**2),
        "BLOCK": block,
        "PRECISION": precision(dtype),
        "BIAS": bias is not None,
        "ACTIVATION": activation,
    }
