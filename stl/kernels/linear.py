"""The STL layer as one operator of PyTorch, `stl::linear`, with its gradient, shapes and cost.

As one operator it keeps x and the channels before the decode for the backward pass, not the encoded x; that is encoded
again where the backward pass reads x anyway.
"""

from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stl.kernels.decode import decode, decode_gradient
from stl.kernels.encode import encode, encode_gradient
from stl.kernels.tiles import Tiling
from stl.precision import autocast_dtype


def linear(
    x: Tensor, weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, row_axis: str, out_features: int
) -> Tensor:
    """`stl.functional.stl_linear` by kernels, for arguments that it has checked; casts them as autocast asks."""
    if dtype := autocast_dtype(x):
        x, weight, encoder, decoder = (tensor.to(dtype) for tensor in (x, weight, encoder, decoder))
        bias = None if bias is None else bias.to(dtype)
    shape = x.shape
    if row_axis == "batch":
        x = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    else:
        x = x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
    y, _ = torch.ops.stl.linear(x, weight, encoder, decoder, bias, out_features, row_axis == "batch")
    return y.view(*shape[:-1], out_features)


@torch.library.custom_op("stl::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    out_features: int,
    rows_first: bool,
) -> tuple[Tensor, Tensor]:
    """x (B, n, k), or (n, B, k) where `rows_first` → y of that order with m features, and the channels (r, P, M)."""
    tile = _tile(encoder)
    y = x.new_empty(*x.shape[:2], out_features)
    channels = torch.bmm(encode(_samples(x, rows_first), encoder.contiguous(), tile), weight)
    decode(channels, decoder.contiguous(), _samples(y, rows_first), tile, bias)
    return y, channels


@_linear.register_fake
def _(x, weight, encoder, decoder, bias, out_features, rows_first):
    rows = Tiling(_samples(x, rows_first), _tile(encoder)).rows
    return x.new_empty(*x.shape[:2], out_features), x.new_empty(weight.shape[0], rows, weight.shape[2])


@torch.library.custom_op("stl::linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    channels: Tensor | None,
    bias: bool,
    rows_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, encoder, decoder and bias; the last two are empty where no `channels` or no `bias`."""
    tile, dtype = _tile(encoder), x.dtype
    dchannels, ddecoder, dbias = encode_gradient(
        _samples(gradient, rows_first), decoder.contiguous(), tile, channels, bias
    )
    dencoded = torch.bmm(dchannels, weight.mT)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    encoded, dencoder = decode_gradient(
        dencoded, encoder.contiguous(), _samples(x, rows_first), _samples(dx, rows_first), tile
    )
    dweight = torch.bmm(encoded.mT, dchannels)
    ddecoder, dbias = (x.new_empty(0) if total is None else total.to(dtype) for total in (ddecoder, dbias))
    return dx, dweight, dencoder.to(dtype), ddecoder, dbias


@_linear_backward.register_fake
def _(gradient, x, weight, encoder, decoder, channels, bias, rows_first):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        encoder.new_empty(encoder.shape),
        decoder.new_empty(decoder.shape if channels is not None else 0),
        gradient.new_empty(gradient.shape[-1] if bias else 0),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, encoder, decoder, bias, _, ctx.rows_first = inputs
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, encoder, decoder, output[1] if ctx.needs_input_grad[3] else None)


def _backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    bias = ctx.has_bias and ctx.needs_input_grad[4]
    gradients = torch.ops.stl.linear_backward(gradient, *ctx.saved_tensors, bias, ctx.rows_first)
    needed = (*ctx.needs_input_grad[:4], bias)
    return (*(d if need else None for d, need in zip(gradients, needed, strict=True)), None, None)


_linear.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.stl.linear)
def _flops(x, weight, encoder, decoder, bias, out_features, rows_first, *, out_val=None, **_) -> int:
    return 2 * sum(_macs(x, weight, encoder, rows_first))


@register_flop_formula(torch.ops.stl.linear_backward)
def _backward_flops(gradient, x, weight, encoder, decoder, channels, bias, rows_first, **_) -> int:
    coded, core, decoded = _macs(x, weight, encoder, rows_first)
    return 2 * (3 * coded + 2 * core + (1 if channels is None else 2) * decoded)


def _macs(x: Any, weight: Any, encoder: Any, rows_first: bool) -> tuple[int, int, int]:
    """Of encode, core and decode, from shapes."""
    (rank, K, M), entries = weight, encoder[1]
    samples, n = x[1::-1][:2] if rows_first else x[:2]
    P = samples * ceil(n / _side(entries))
    return P * K * entries * rank, P * K * M * rank, P * M * entries * rank


def _samples(x: Tensor, rows_first: bool) -> Tensor:
    """As (B, n, k)."""
    return x.transpose(0, 1) if rows_first else x


def _tile(encoder: Tensor) -> int:
    return _side(encoder.shape[1])


def _side(entries: int) -> int:
    return round(entries**0.5)
