"""The STL layer as two operators of PyTorch, `stl::encode_gemm` and `stl::decode`, with gradients, shapes and costs;
but narrow ones are one product (`expanded.py`).

Each of the two keeps what it was given for its backward pass: x unencoded, to be encoded again where the backward pass
reads it anyway, and the channels between the two, which the gradient of the decoder needs, only where there is one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stl.kernels.autocast import as_autocast, register_autocast
from stl.kernels.decode import decode, decode_gradient
from stl.kernels.encode import encode, encode_gradient
from stl.kernels.expanded import expanded_linear, is_expanded
from stl.kernels.operators import (
    added,
    as_samples,
    contiguous,
    encode_gemm_macs,
    features_last,
    only_once,
    operator,
    rows_of_tiles,
    sample_view,
    sum_dtype,
    tile_of,
    wanted,
)
from stl.kernels.weight_gradient import weight_gradient


def linear(
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    row_axis: str,
    out_features: int,
    residual: Tensor | None,
) -> Tensor:
    """`stl.functional.stl_linear` by kernels, for arguments that it has checked."""
    if is_expanded(x, tile_of(encoder), len(encoder), [(x.shape[-1], out_features)], row_axis):
        return expanded_linear(x, weight, encoder, decoder, bias, out_features, residual)
    samples, rows_first = as_samples(x, row_axis)
    samples, weight, encoder, decoder, bias = as_autocast(samples, samples, weight, encoder, decoder, bias)
    samples, other = features_last(samples), added(residual, row_axis)
    channels = encode_gemm(samples, weight, encoder, rows_first)
    y = torch.ops.stl.decode(channels, decoder, bias, other, *samples.shape[:2], out_features, rows_first)
    return y.view(*x.shape[:-1], out_features)


# --- encode and multiply -----------------------------------------------------------------------------------------


def encode_gemm(x: Tensor, weight: Tensor, encoder: Tensor, rows_first: bool) -> Tensor:
    """`stl::encode_gemm` with rows of zeros added to the weight, where few make each row of the encoded input a
    multiple of 16 bytes: GEMMs of other rows take several times as long."""
    more = -weight.shape[1] % (16 // weight.element_size())
    if 0 < 4 * more <= weight.shape[1]:
        weight = F.pad(weight, (0, 0, 0, more))
    return torch.ops.stl.encode_gemm(x, weight, encoder, rows_first)


@operator("encode_gemm")
def _encode_gemm(x: Tensor, weight: Tensor, encoder: Tensor, rows_first: bool) -> Tensor:
    """x (B, n, k), or (n, B, k) where `rows_first`; encoder (r, t²); weight (r, K, M), whose rows from ⌈k/t⌉ on meet
    tiles of zeros → channels (r, P, M)."""
    encoded = encode(sample_view(x, rows_first), encoder.contiguous(), tile_of(encoder), weight.shape[1])
    return torch.bmm(encoded, weight)


@_encode_gemm.register_fake
def _(x, weight, encoder, rows_first):
    return x.new_empty(weight.shape[0], rows_of_tiles(x.shape, tile_of(encoder), rows_first), weight.shape[2])


@operator("encode_gemm_backward")
def _encode_gemm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, encoder: Tensor, rows_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and encoder."""
    channels = torch.bmm(gradient, weight.mT)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dencoder = decode_gradient(
        channels,
        encoder.contiguous(),
        sample_view(x, rows_first),
        sample_view(dx, rows_first),
        tile_of(encoder),
    )
    return dx, weight_gradient(channels, gradient), dencoder


@_encode_gemm_backward.register_fake
def _(gradient, x, weight, encoder, rows_first):
    return tuple(torch.empty_like(of, memory_format=torch.contiguous_format) for of in (x, weight, encoder))


def _keep_input(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.rows_first = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_encode_gemm(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.stl.encode_gemm_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.rows_first)
    return *wanted(gradients, ctx.needs_input_grad), None


_encode_gemm.register_autograd(_differentiate_encode_gemm, setup_context=_keep_input)
_encode_gemm_backward.register_autograd(only_once)
register_autocast(_encode_gemm, 0, 2)


@register_flop_formula(torch.ops.stl.encode_gemm)
def _(x, weight, encoder, rows_first, **_) -> int:
    tile = round(encoder[1] ** 0.5)
    coded, core = encode_gemm_macs(rows_of_tiles(x, tile, rows_first), _needed(x, weight, tile), encoder)
    return 2 * (coded + core)


@register_flop_formula(torch.ops.stl.encode_gemm_backward)
def _(gradient, x, weight, encoder, rows_first, **_) -> int:
    coded, core = encode_gemm_macs(gradient[1], _needed(x, weight, round(encoder[1] ** 0.5)), encoder)
    return 2 * (3 * coded + 2 * core)


def _needed(x: Any, weight: Any, tile: int) -> tuple[int, int, int]:
    """The shape of the weight without rows that are there for alignment alone."""
    return weight[0], -(-x[2] // tile), weight[2]


# --- decode ------------------------------------------------------------------------------------------------------


@operator("decode")
def _decode(
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    first: int,
    second: int,
    m: int,
    rows_first: bool,
) -> Tensor:
    """channels (r, P, M), decoder (r, t²), bias (m,) → y (first, second, m), which is (B, n, m) or (n, B, m), with the
    residual of y's shape and any precision added before y is rounded to the higher precision of the two."""
    if residual is not None and residual.dtype == torch.float64:  # which kernels would round
        return (_decode(channels, decoder, bias, None, first, second, m, rows_first) + residual).contiguous()
    y = channels.new_empty(first, second, m, dtype=sum_dtype(channels, residual))
    other = None if residual is None else sample_view(residual, rows_first)
    decode(
        channels.contiguous(),
        decoder.contiguous(),
        sample_view(y, rows_first),
        tile_of(decoder),
        contiguous(bias),
        other,
    )
    return y


@_decode.register_fake
def _(channels, decoder, bias, residual, first, second, m, rows_first):
    return channels.new_empty(first, second, m, dtype=sum_dtype(channels, residual))


@operator("decode_backward")
def _decode_backward(
    gradient: Tensor, channels: Tensor | None, decoder: Tensor, bias: bool, rows_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of channels, decoder and bias; the last two are empty without `channels`, or without `bias`."""
    dchannels, ddecoder, dbias = encode_gradient(
        sample_view(gradient, rows_first), decoder.contiguous(), tile_of(decoder), contiguous(channels), bias
    )
    ddecoder, dbias = (dchannels.new_empty(0) if total is None else total for total in (ddecoder, dbias))
    return dchannels, ddecoder, dbias


@_decode_backward.register_fake
def _(gradient, channels, decoder, bias, rows_first):
    tile = tile_of(decoder)
    P, M = rows_of_tiles(gradient.shape, tile, rows_first), -(-gradient.shape[2] // tile)
    return (
        decoder.new_empty(decoder.shape[0], P, M),
        decoder.new_empty(0 if channels is None else decoder.shape),
        decoder.new_empty(gradient.shape[2] if bias else 0),
    )


def _keep_channels(ctx: Any, inputs: tuple, output: Tensor) -> None:
    channels, decoder, bias, residual, *_, ctx.rows_first = inputs
    ctx.has_bias = bias is not None
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(channels if ctx.needs_input_grad[1] else None, decoder)


def _differentiate_decode(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    bias = ctx.has_bias and ctx.needs_input_grad[2]
    gradients = torch.ops.stl.decode_backward(gradient, *ctx.saved_tensors, bias, ctx.rows_first)
    dresidual = gradient.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None  # the same numbers
    return *wanted(gradients, (*ctx.needs_input_grad[:2], bias)), dresidual, None, None, None, None


_decode.register_autograd(_differentiate_decode, setup_context=_keep_channels)
_decode_backward.register_autograd(only_once)
register_autocast(_decode, 0, 2)


@register_flop_formula(torch.ops.stl.decode)
def _(channels, decoder, *_, **__) -> int:
    return 2 * channels[1] * channels[2] * decoder[0] * decoder[1]


@register_flop_formula(torch.ops.stl.decode_backward)
def _(gradient, channels, decoder, bias, rows_first, *, out_shape, **_) -> int:
    (_, P, M), *_ = out_shape
    return 2 * P * M * decoder[0] * decoder[1] * (1 if channels is None else 2)
