"""Between the layers of an MLP: channels → decode, bias, activation, encode → channels, and back.

In a gated MLP two layers stand before it, and the activation of the one is multiplied with the other. The hidden
activations never reach memory, neither way: the backward pass computes them again from the channels.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels.activations import activate, slope
from stl.kernels.shares import add_up
from stl.kernels.tiles import (
    MANY_PROGRAMS,
    PROGRAMS,
    READ_NEXT,
    Grid,
    Tiling,
    by_column,
    channel_places,
    constants,
    divide,
    few_channels,
    load_basis,
    multiply,
    own_groups,
    padded,
    store_column_sums,
    store_product,
    tiles_exist,
)


class Coded(NamedTuple):
    """What a layer gives before its decode: channels (r, P, M), with its decoder (r, t²) and bias (m,).

    Where one layer gives two such, side by side, the channels of each are columns of wider ones.
    """

    channels: Tensor
    decoder: Tensor
    bias: Tensor | None


@triton.jit
def _shift(bias, j, m, T: tl.constexpr, TT: tl.constexpr, BIAS: tl.constexpr, BESIDE: tl.constexpr):
    """What the bias adds to the groups j, (TT, BLOCK)."""
    if BIAS:
        return by_column(bias, own_groups(j, BESIDE), m, T, TT)
    else:
        return tl.zeros((TT, j.shape[0]), tl.float32)


@triton.jit
def _decoded(
    channels, decoder, shift, p, j, N, P, M, width, R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """(offsets of channels, which of them exist, coded channels, decoded tiles with bias)."""
    places, exist = channel_places(p, j, N, P, M, width, R, RP, S, FULL, BESIDE)
    coded = tl.load(channels + places, mask=exist, other=0.0)
    return places, exist, coded, multiply(tl.trans(decoder), coded, None, PRECISION) + shift


@triton.jit
def _hidden(
    channels, decoder, bias, up, up_decoder, up_bias, encoder, output, n, m, N, P, M, width,
    T: tl.constexpr, R: tl.constexpr, RU: tl.constexpr, R2: tl.constexpr,
    S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, RPU: tl.constexpr, RP2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BITS: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK groups of ROWS rows of tiles, one row after the other."""
    blocks = tl.cdiv(BESIDE[0] * M, BLOCK * S)
    chunk = tl.program_id(0) // blocks
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    decode, encode = load_basis(decoder, R, T, RP, TT), load_basis(encoder, R2, T, RP2, TT)
    shift = _shift(bias, j, m, T, TT, BIAS, BESIDE)
    if GATED:
        up_decode = load_basis(up_decoder, RU, T, RPU, TT)
        up_shift = _shift(up_bias, j, m, T, TT, UP_BIAS, BESIDE)
    for step in range(ROWS):
        p = chunk * ROWS + step
        _, _, _, tiles = _decoded(channels, decode, shift, p, j, N, P, M, width, R, RP, S, PRECISION, FULL, BESIDE)
        values = activate(tiles, ACTIVATION, BITS)
        if GATED:
            _, _, _, factor = _decoded(
                up, up_decode, up_shift, p, j, N, P, M, width, RU, RPU, S, PRECISION, FULL, BESIDE
            )  # fmt: skip
            values *= factor
        values = tl.where(tiles_exist(p, j, N, P, n, m, T, TT, FULL, BESIDE), values, 0.0)
        encoded = multiply(encode, values.to(output.dtype.element_ty), None, PRECISION)
        places, exist = channel_places(p, j, N, P, M, M, R2, RP2, S, FULL, BESIDE)
        tl.store(output + places, encoded.to(output.dtype.element_ty), mask=exist, eviction_policy=READ_NEXT)


@triton.jit
def _hidden_backward(
    channels, decoder, bias, up, up_decoder, up_bias, encoder, gradient,
    dchannels, ddecoder, dbias, dup, dup_decoder, dup_bias, dencoder, n, m, N, P, M, width,
    T: tl.constexpr, R: tl.constexpr, RU: tl.constexpr, R2: tl.constexpr,
    S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, RPU: tl.constexpr, RP2: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BITS: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """A program takes the same BLOCK groups of ROWS rows of tiles, one row after the other."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(BESIDE[0] * M, BLOCK * S)
    chunk = pid // blocks
    j = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    decode, encode = load_basis(decoder, R, T, RP, TT), load_basis(encoder, R2, T, RP2, TT)
    decoder_product = tl.zeros((RP, TT), tl.float32)
    encoder_product = tl.zeros((RP2, TT), tl.float32)
    total = tl.zeros((TT, BLOCK), tl.float32)
    shift = _shift(bias, j, m, T, TT, BIAS, BESIDE)
    if GATED:
        up_decode = load_basis(up_decoder, RU, T, RPU, TT)
        up_product = tl.zeros((RPU, TT), tl.float32)
        up_total = tl.zeros((TT, BLOCK), tl.float32)
        up_shift = _shift(up_bias, j, m, T, TT, UP_BIAS, BESIDE)
    for step in range(ROWS):
        p = chunk * ROWS + step
        places, exist, coded, tiles = _decoded(
            channels, decode, shift, p, j, N, P, M, width, R, RP, S, PRECISION, FULL, BESIDE
        )  # fmt: skip
        tiles_are = tiles_exist(p, j, N, P, n, m, T, TT, FULL, BESIDE)
        values = activate(tiles, ACTIVATION, BITS)
        places2, exist2 = channel_places(p, j, N, P, M, M, R2, RP2, S, FULL, BESIDE)
        dcoded = tl.load(gradient + places2, mask=exist2, other=0.0)
        dtiles = tl.where(tiles_are, multiply(tl.trans(encode), dcoded, None, PRECISION), 0.0)
        if GATED:
            up_places, up_exist, up_coded, factor = _decoded(
                up, up_decode, up_shift, p, j, N, P, M, width, RU, RPU, S, PRECISION, FULL, BESIDE
            )  # fmt: skip
            dfactor = dtiles * values
            up_total += dfactor
            dfactor = dfactor.to(coded.dtype)
            up_product = multiply(up_coded, tl.trans(dfactor), up_product, PRECISION)
            dup_coded = multiply(up_decode, dfactor, None, PRECISION)
            tl.store(dup + up_places, dup_coded.to(dup.dtype.element_ty), mask=up_exist)
            values *= factor
            dtiles *= factor
        values = tl.where(tiles_are, values, 0.0).to(coded.dtype)
        again = multiply(encode, values, None, PRECISION)
        tl.store(gradient + places2, again.to(gradient.dtype.element_ty), mask=exist2)  # `dcoded` has been read
        encoder_product = multiply(dcoded, tl.trans(values), encoder_product, PRECISION)
        dtiles *= slope(tiles, ACTIVATION, BITS)
        total += dtiles
        dtiles = dtiles.to(coded.dtype)
        decoder_product = multiply(coded, tl.trans(dtiles), decoder_product, PRECISION)
        dcoded = multiply(decode, dtiles, None, PRECISION)
        tl.store(dchannels + places, dcoded.to(dchannels.dtype.element_ty), mask=exist)
    store_product(decoder_product, ddecoder, pid, R, T, RP, TT)
    store_product(encoder_product, dencoder, pid, R2, T, RP2, TT)
    if BIAS:
        store_column_sums(total, dbias, chunk, j, BESIDE[0] * m, T, TT)
    if GATED:
        store_product(up_product, dup_decoder, pid, RU, T, RPU, TT)
        if UP_BIAS:
            store_column_sums(up_total, dup_bias, chunk, j, BESIDE[0] * m, T, TT)


def hidden(first: Coded, up: Coded | None, encoder: Tensor, activation: str, tiling: Tiling, width: int) -> Tensor:
    """The channels (r', P, M) of activation(first), or of activation(first)·up, for an encoder (r', t²).

    `width` is how far apart the rows of channels of `first` and `up` are in memory.
    """
    output = first.channels.new_empty(len(encoder), *first.channels.shape[1:])
    dtype = output.dtype
    block = 64 if _highest_rank(first, up, encoder) * tiling.group > 32 else 128
    tiling = tiling.in_whole_blocks(block)
    grid = divide(tiling, block, 4 if dtype != torch.float32 else 8, MANY_PROGRAMS, most_rows=16)
    if output.numel():
        with torch.cuda.device_of(output):
            _hidden[(grid.programs,)](
                *first, *(up or (None,) * 3), encoder, output, *tiling.sizes(), width,
                **_constants(first, up, encoder, activation, tiling, grid),
            )  # fmt: skip
    return output


def hidden_gradient(
    first: Coded,
    up: Coded | None,
    encoder: Tensor,
    gradient: Tensor,
    dchannels: tuple[Tensor, Tensor | None],
    activation: str,
    tiling: Tiling,
    width: int,
    halves: bool,
) -> tuple[Coded, Coded | None, Tensor]:
    """The gradient (r', P, M) of what `hidden` gave → in one pass over memory those of `first`, `up` and `encoder`.

    Those of the channels are written to `dchannels`, laid out as the channels are, and what `hidden` gave is written
    over `gradient`. Where both are `halves` of one layer, `first` has the gradients of its decoder
    and bias.
    """
    # Measured: one warp has too few registers, and half a block takes longer than a few tiles that are empty; where a
    # tile of 8 or a product in float32 needs most registers, loads ahead of their use do not pay.
    precise = gradient.dtype == torch.float32
    layers = 1 if up is None else 2
    block = 32 if precise else 64
    tiling = tiling.in_whole_blocks(block)
    few = few_channels(tiling, gradient.dtype, layers * _highest_rank(first, up, encoder))
    warps = 2 if few or (precise and layers == 1) else 4
    grid = divide(tiling, block, warps, PROGRAMS, most_empty=1 / 8)
    grid = grid._replace(warps=max(2, grid.warps))

    def shares(of: Coded, channels: Tensor) -> Coded:
        """Memory for the gradient of the channels, and for a share of each program in the others."""
        return Coded(
            channels,
            gradient.new_empty(grid.programs, *of.decoder.shape, dtype=torch.float32),
            None
            if of.bias is None
            else gradient.new_empty(grid.chunks * tiling.together, tiling.k, dtype=torch.float32),
        )

    def total(shares: Tensor) -> Tensor:
        return add_up(shares, gradient.dtype)

    def added(of: Coded) -> Coded:
        return Coded(of.channels, total(of.decoder), None if of.bias is None else total(of.bias))

    dfirst = shares(first, dchannels[0])
    dup = None if up is None or dchannels[1] is None else shares(up, dchannels[1])
    dencoder = gradient.new_empty(grid.programs, *encoder.shape, dtype=torch.float32)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            _hidden_backward[(grid.programs,)](
                *first, *(up or (None,) * 3), encoder, gradient, *dfirst, *(dup or (None,) * 3), dencoder,
                *tiling.sizes(), width, **_constants(first, up, encoder, activation, tiling, grid),
                num_stages=1 if precise or tiling.tile == 8 else 3,
            )  # fmt: skip
    if dup is not None and halves:
        decoder = torch.cat([dfirst.decoder, dup.decoder])
        bias = None if dfirst.bias is None or dup.bias is None else torch.cat([dfirst.bias, dup.bias], 1)
        dfirst, dup = Coded(dfirst.channels, decoder, bias), None
    return added(dfirst), None if dup is None else added(dup), total(dencoder)


def _highest_rank(first: Coded, up: Coded | None, encoder: Tensor) -> int:
    return max(len(first.decoder), len(encoder), 0 if up is None else len(up.decoder))


def _constants(
    first: Coded, up: Coded | None, encoder: Tensor, activation: str, tiling: Tiling, grid: Grid
) -> dict[str, Any]:
    dtype, rank = first.channels.dtype, len(first.decoder)
    up_rank = rank if up is None else len(up.decoder)
    return {
        **constants(tiling, rank, dtype, grid),
        "RU": up_rank,
        "RPU": padded(up_rank * tiling.group),
        "R2": len(encoder),
        "RP2": padded(len(encoder) * tiling.group),
        "BIAS": first.bias is not None,
        "GATED": up is not None,
        "UP_BIAS": up is not None and up.bias is not None,
        "ACTIVATION": activation,
        "BITS": {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype],
    }
