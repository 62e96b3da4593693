"""A narrow STL layer as one operator of PyTorch, `stl::narrow_linear`, with gradients, shapes and costs.

For its backward pass it keeps what it was given: channels are computed again from x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stl.kernels.autocast import register_autocast
from stl.kernels.narrow import narrow, narrow_gradient
from stl.kernels.operators import (
    Layer,
    contiguous,
    encode_gemm_macs,
    only_once,
    operator,
    rows_of_tiles,
    sample_view,
    sum_dtype,
    wanted,
)


@operator("narrow_linear")
def _narrow_linear(
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    m: int,
    activation: str,
    rows_first: bool,
) -> Tensor:
    """x (B, n, k), or (n, B, k) where `rows_first`; weight (r, K, M); encoder, decoder (r, t²); bias (m,) → what the
    layer gives, (B, n, m) or (n, B, m), activated where the activation has a name, with the residual, of that shape and
    any precision, added before it is rounded to the higher precision of the two."""
    if residual is not None and residual.dtype == torch.float64:  # which kernels would round
        y = _narrow_linear(x, weight, encoder, decoder, bias, None, m, activation, rows_first)
        return (y + residual).contiguous()
    y = x.new_empty(*x.shape[:2], m, dtype=sum_dtype(x, residual))
    other = None if residual is None else sample_view(residual, rows_first)
    layer = _layer(weight, encoder, decoder, bias)
    narrow(sample_view(x, rows_first), layer, sample_view(y, rows_first), other, activation)
    return y


@_narrow_linear.register_fake
def _(x, weight, encoder, decoder, bias, residual, m, activation, rows_first):
    return x.new_empty(*x.shape[:2], m, dtype=sum_dtype(x, residual))


@operator("narrow_linear_backward")
def _narrow_linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    activation: str,
    rows_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, encoder, decoder and bias; the last is empty where there is none."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    layer = _layer(weight, encoder, decoder, bias)
    gradient, x, inputs = (sample_view(of, rows_first) for of in (gradient, x, dx))
    dweight, dencoder, ddecoder, dbias = narrow_gradient(gradient, x, layer, inputs, activation)
    return dx, dweight, dencoder, ddecoder, x.new_empty(0) if dbias is None else dbias


@_narrow_linear_backward.register_fake
def _(gradient, x, weight, encoder, decoder, bias, activation, rows_first):
    return tuple(x.new_empty(0 if of is None else of.shape) for of in (x, weight, encoder, decoder, bias))


def _layer(weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> Layer:
    return (weight.contiguous(), encoder.contiguous(), decoder.contiguous(), contiguous(bias))


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, residual, _, ctx.activation, ctx.rows_first = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = (None,) * 5
    if any(ctx.needs_input_grad[:5]):
        arguments = *ctx.saved_tensors, ctx.activation, ctx.rows_first
        gradients = torch.ops.stl.narrow_linear_backward(gradient, *arguments)
    dresidual = gradient.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None  # the same numbers
    return *wanted(gradients, ctx.needs_input_grad), dresidual, None, None, None


_narrow_linear.register_autograd(_differentiate, setup_context=_keep)
_narrow_linear_backward.register_autograd(only_once)
register_autocast(_narrow_linear, 0, 4)


@register_flop_formula(torch.ops.stl.narrow_linear)
def _(x, weight, encoder, decoder, bias, residual, m, activation, rows_first, **_) -> int:
    return 2 * sum(_macs(x, weight, encoder, rows_first))


@register_flop_formula(torch.ops.stl.narrow_linear_backward)
def _(gradient, x, weight, encoder, decoder, bias, activation, rows_first, **_) -> int:
    coded, core, decoded = _macs(x, weight, encoder, rows_first)
    return 2 * (3 * coded + 3 * core + (3 if activation else 2) * decoded)


def _macs(x: Any, weight: Any, encoder: Any, rows_first: bool) -> tuple[int, int, int]:
    """Of encode, products and decode, from shapes."""
    P = rows_of_tiles(x, round(encoder[1] ** 0.5), rows_first)
    return *encode_gemm_macs(P, weight, encoder), P * weight[2] * encoder[0] * encoder[1]
