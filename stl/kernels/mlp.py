"""STL layers with an activation between them: `stl::hidden_gemm` stands between their GEMMs.

What it keeps for the backward pass are the channels of the layers before it; the hidden activations are nowhere in
memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stl.kernels.autocast import as_autocast, register_autocast
from stl.kernels.hidden import Coded, hidden, hidden_gradient
from stl.kernels.linear import encode_gemm
from stl.kernels.norm import norm_encode_gemm
from stl.kernels.operators import (
    Layer,
    added,
    as_samples,
    contiguous,
    encode_gemm_macs,
    only_once,
    operator,
    tile_of,
    wanted,
)
from stl.kernels.tiles import Tiling
from stl.kernels.weight_gradient import weight_gradient
from stl.normalisation import Norm


def mlp(
    x: Tensor,
    first: Layer,
    up: Layer | None,
    second: Layer,
    activation: str,
    row_axis: str,
    hidden_features: int,
    out_features: int,
    norm: Norm | None,
    residual: Tensor | None,
) -> Tensor:
    """second(activation(first(x))), or second(activation(first(x))·up(x)), by kernels.

    Where `first` gives 2·`hidden_features`, up is the second half of them. With a norm, of norm(x); with a residual,
    that is added.
    """
    samples, rows_first = as_samples(x, row_axis)
    other = added(residual, row_axis)

    def coded(layer: Layer) -> Coded:
        weight, encoder, decoder, bias = as_autocast(samples, *layer)
        if norm is not None:
            return Coded(norm_encode_gemm(samples, norm, weight, encoder, rows_first), decoder, bias)
        inputs = as_autocast(samples, samples)[0]
        return Coded(encode_gemm(inputs, weight, encoder, rows_first), decoder, bias)

    before = (*coded(first), *(Coded(None, None, None) if up is None else coded(up)))  # type: ignore[arg-type]
    weight, encoder, decoder, bias = as_autocast(samples, *second)
    sizes = samples.shape[:2]
    count, n = sizes[::-1] if rows_first else sizes
    channels = torch.ops.stl.hidden_gemm(*before, encoder, weight, activation, count, n, hidden_features)
    y = torch.ops.stl.decode(channels, decoder, bias, other, *sizes, out_features, rows_first)
    return y.view(*x.shape[:-1], out_features)


@operator("hidden_gemm")
def _hidden_gemm(
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_decoder: Tensor | None,
    up_bias: Tensor | None,
    encoder: Tensor,
    weight: Tensor,
    activation: str,
    samples: int,
    n: int,
    m: int,
) -> Tensor:
    """channels (r, P, M) of (samples, n, m), with their decoder (r, t²) and bias (m,), and of a gated MLP the same of
    its other layer, or without it (r, P, 2M) and (2m,) of both; encoder (r', t²) and weight (r', M, J) of the last
    layer → channels (r', P, J)."""
    columns = weight.shape[1]
    channels, up = channels.contiguous(), contiguous(up)
    before = _before(channels, decoder, bias, up, up_decoder, up_bias, columns, m)
    tiling = Tiling(samples, n, m, tile_of(decoder), columns)
    coded = hidden(*before, encoder.contiguous(), activation, tiling, channels.shape[2])
    return torch.bmm(coded, weight)


@_hidden_gemm.register_fake
def _(channels, decoder, bias, up, up_decoder, up_bias, encoder, weight, activation, samples, n, m):
    return channels.new_empty(weight.shape[0], channels.shape[1], weight.shape[2])


@operator("hidden_gemm_backward")
def _hidden_gemm_backward(
    gradient: Tensor,
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_decoder: Tensor | None,
    up_bias: Tensor | None,
    encoder: Tensor,
    weight: Tensor,
    activation: str,
    samples: int,
    n: int,
    m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight arguments of `stl::hidden_gemm`; empty where there is none."""
    inner, columns = torch.bmm(gradient, weight.mT), weight.shape[1]
    channels, up = channels.contiguous(), contiguous(up)
    before = _before(channels, decoder, bias, up, up_decoder, up_bias, columns, m)
    tiling = Tiling(samples, n, m, tile_of(decoder), columns)
    dchannels = torch.empty_like(channels)
    parts = _parts(dchannels, None if up is None else torch.empty_like(up), columns)
    dfirst, dup, dencoder = hidden_gradient(
        *before, encoder.contiguous(), inner, parts, activation, tiling, channels.shape[2], up is None
    )
    gradients = (dchannels, *dfirst[1:], *(dup or (None,) * 3), dencoder)
    given = (channels.new_empty(0) if one is None else one for one in gradients)
    return *given, weight_gradient(inner, gradient)  # type: ignore[return-value]


@_hidden_gemm_backward.register_fake
def _(gradient, channels, decoder, bias, up, up_decoder, up_bias, encoder, weight, activation, samples, n, m):
    inputs = (channels, decoder, bias, up, up_decoder, up_bias, encoder, weight)
    return tuple(channels.new_empty(0 if of is None else of.shape) for of in inputs)


def _before(
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_decoder: Tensor | None,
    up_bias: Tensor | None,
    columns: int,
    m: int,
) -> tuple[Coded, Coded | None]:
    """What meets the activation, and in a gated MLP what is multiplied with that."""
    decoder, bias = decoder.contiguous(), contiguous(bias)
    gate, up = _parts(channels, up, columns)
    if up is None:
        return Coded(gate, decoder, bias), None
    if up_decoder is not None:
        return Coded(gate, decoder, bias), Coded(up, up_decoder.contiguous(), contiguous(up_bias))
    first, second = (None, None) if bias is None else bias.split(m)
    return Coded(gate, decoder, first), Coded(up, decoder, second)


def _parts(channels: Tensor, up: Tensor | None, columns: int) -> tuple[Tensor, Tensor | None]:
    """The channels of both layers, or of both halves of one; None where the MLP is not gated."""
    if channels.shape[2] == columns:
        return channels, up
    return channels[..., :columns], channels[..., columns:]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation, ctx.samples, ctx.n, ctx.m = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.stl.hidden_gemm_backward(
        gradient.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.samples, ctx.n, ctx.m
    )
    return *wanted(gradients, ctx.needs_input_grad), None, None, None, None


_hidden_gemm.register_autograd(_differentiate, setup_context=_keep)
_hidden_gemm_backward.register_autograd(only_once)
register_autocast(_hidden_gemm, 0, 7)


@register_flop_formula(torch.ops.stl.hidden_gemm)
def _(channels, decoder, bias, up, up_decoder, up_bias, encoder, weight, *_, **__) -> int:
    decoded, coded, core = _macs(channels, decoder, up_decoder, encoder, weight)
    return 2 * (decoded + coded + core)


@register_flop_formula(torch.ops.stl.hidden_gemm_backward)
def _(gradient, channels, decoder, bias, up, up_decoder, up_bias, encoder, weight, *_, **__) -> int:
    decoded, coded, core = _macs(channels, decoder, up_decoder, encoder, weight)
    return 2 * (3 * decoded + 3 * coded + 2 * core)


def _macs(channels: Any, decoder: Any, up_decoder: Any, encoder: Any, weight: Any) -> tuple[int, int, int]:
    """Of decode, encode and batched GEMM, from shapes."""
    ranks = decoder[0] + (up_decoder[0] if up_decoder else 0)
    return channels[1] * channels[2] * ranks * decoder[1], *encode_gemm_macs(channels[1], weight, encoder)
