"""Two STL layers with an activation between them: `stl::hidden_gemm` stands between their two GEMMs.

What it keeps for the backward pass are the channels of the first layer; the hidden activations are nowhere in memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stl.kernels.hidden import hidden, hidden_gradient
from stl.kernels.linear import as_autocast, as_samples, encode_gemm_macs, tile_of, wanted
from stl.kernels.tiles import Tiling


def mlp(
    x: Tensor,
    first: tuple[Tensor, Tensor, Tensor, Tensor | None],
    second: tuple[Tensor, Tensor, Tensor, Tensor | None],
    activation: str,
    row_axis: str,
    hidden_features: int,
    out_features: int,
) -> Tensor:
    """stl_linear, activation, stl_linear, each with its (weight, encoder, decoder, bias), by kernels."""
    samples, rows_first = as_samples(x, row_axis)
    samples, weight, encoder, decoder, bias = as_autocast(samples, *first)
    _, weight2, encoder2, decoder2, bias2 = as_autocast(samples, *second)
    sizes = samples.shape[:2]
    channels = torch.ops.stl.encode_gemm(samples, weight, encoder, rows_first)
    count, n = sizes[::-1] if rows_first else sizes
    channels = torch.ops.stl.hidden_gemm(
        channels, decoder, bias, encoder2, weight2, activation, count, n, hidden_features
    )
    y = torch.ops.stl.decode(channels, decoder2, bias2, *sizes, out_features, rows_first)
    return y.view(*x.shape[:-1], out_features)


@torch.library.custom_op("stl::hidden_gemm", mutates_args=())
def _hidden_gemm(
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    encoder: Tensor,
    weight: Tensor,
    activation: str,
    samples: int,
    n: int,
    m: int,
) -> Tensor:
    """channels (r, P, M) of (samples, n, m); decoder (r, t²), bias (m,); encoder (r', t²), weight (r', M, J) of the
    second layer → channels (r', P, J)."""
    tiling = Tiling(samples, n, m, tile_of(decoder))
    return torch.bmm(hidden(channels, decoder.contiguous(), bias, encoder.contiguous(), activation, tiling), weight)


@_hidden_gemm.register_fake
def _(channels, decoder, bias, encoder, weight, activation, samples, n, m):
    return channels.new_empty(weight.shape[0], channels.shape[1], weight.shape[2])


@torch.library.custom_op("stl::hidden_gemm_backward", mutates_args=())
def _hidden_gemm_backward(
    gradient: Tensor,
    channels: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    encoder: Tensor,
    weight: Tensor,
    activation: str,
    samples: int,
    n: int,
    m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of channels, decoder, bias (empty where there is none), encoder and weight."""
    inner = torch.bmm(gradient, weight.mT)
    dchannels, ddecoder, dencoder, dbias = hidden_gradient(
        channels,
        decoder.contiguous(),
        bias,
        encoder.contiguous(),
        inner,
        activation,
        Tiling(samples, n, m, tile_of(decoder)),
    )
    dbias = channels.new_empty(0) if dbias is None else dbias.to(channels)
    return dchannels, ddecoder.to(channels), dbias, dencoder.to(channels), torch.bmm(inner.mT, gradient)


@_hidden_gemm_backward.register_fake
def _(gradient, channels, decoder, bias, encoder, weight, activation, samples, n, m):
    dbias = channels.new_empty(0 if bias is None else m)
    like = [torch.empty_like(of, memory_format=torch.contiguous_format) for of in (channels, decoder, encoder, weight)]
    return *like[:2], dbias, *like[2:]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation, ctx.samples, ctx.n, ctx.m = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.stl.hidden_gemm_backward(
        gradient.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.samples, ctx.n, ctx.m
    )
    return *wanted(gradients, ctx.needs_input_grad), None, None, None, None


_hidden_gemm.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.stl.hidden_gemm)
def _(channels, decoder, bias, encoder, weight, *_, **__) -> int:
    decoded, coded, core = _macs(channels, decoder, encoder, weight)
    return 2 * (decoded + coded + core)


@register_flop_formula(torch.ops.stl.hidden_gemm_backward)
def _(gradient, channels, decoder, bias, encoder, weight, *_, **__) -> int:
    decoded, coded, core = _macs(channels, decoder, encoder, weight)
    return 2 * (3 * decoded + 3 * coded + 2 * core)


def _macs(channels: Any, decoder: Any, encoder: Any, weight: Any) -> tuple[int, int, int]:
    """Of decode, encode and batched GEMM, from shapes."""
    return channels[1] * channels[2] * decoder[0] * decoder[1], *encode_gemm_macs(channels[1], weight, encoder)
