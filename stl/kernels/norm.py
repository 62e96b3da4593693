"""LayerNorm or RMSNorm and encode in one pass: `stl::norm_encode_gemm`, and its gradient.

A program holds whole rows of tiles, so that it can normalise them. What is normalised never reaches memory: the
backward pass computes it again from x.
"""

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stl.kernels.autocast import as_autocast, register_autocast
from stl.kernels.operators import (
    Layer,
    added,
    as_samples,
    contiguous,
    encode_gemm_macs,
    only_once,
    operator,
    rows_of_tiles,
    sample_view,
    tile_of,
    wanted,
)
from stl.kernels.shares import add_up
from stl.kernels.tiles import (
    PROGRAMS,
    Grid,
    Tiling,
    by_column,
    channel_places,
    constants,
    divide,
    load_basis,
    multiply,
    padded,
    store_column_sums,
    store_product,
    tile_places,
)
from stl.kernels.weight_gradient import weight_gradient
from stl.normalisation import Norm


def norm_linear(
    x: Tensor, norm: Norm, layer: Layer, row_axis: str, out_features: int, residual: Tensor | None
) -> Tensor:
    """norm, then the layer, with the residual added."""
    samples, rows_first = as_samples(x, row_axis)
    weight, encoder, decoder, bias = as_autocast(samples, *layer)
    channels = norm_encode_gemm(samples, norm, weight, encoder, rows_first)
    sizes = samples.shape[:2]
    y = torch.ops.stl.decode(channels, decoder, bias, added(residual, row_axis), *sizes, out_features, rows_first)
    return y.view(*x.shape[:-1], out_features)


def norm_encode_gemm(samples: Tensor, norm: Norm, weight: Tensor, encoder: Tensor, rows_first: bool) -> Tensor:
    """The normalisation computes in float32 with what it is given, whatever autocast makes of the layer's weights."""
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return torch.ops.stl.norm_encode_gemm(samples, norm.gain, norm.shift, weight, encoder, eps, norm.centre, rows_first)


@triton.jit
def _row_means(values, k, T: tl.constexpr, TT: tl.constexpr):
    """Means over the k features of each row, (TT, BLOCK) → (TT, 1); a group has TT/T entries of a row."""
    sums = tl.reshape(tl.sum(values, 1), (T, TT // T))
    rows = tl.broadcast_to(tl.sum(sums, 1, keep_dims=True), (T, TT // T))
    return tl.reshape(rows, (TT,))[:, None] / k


@triton.jit
def _load_normalised(
    x, stride_b, stride_n, stride_k, n, k, N, P, p, j, eps, T: tl.constexpr, TT: tl.constexpr, FULL: tl.constexpr,
    BESIDE: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """(x̂, 1/σ of its rows, offsets of its entries in x, which of them exist)."""
    places, exist = tile_places(p, j, N, P, n, k, stride_b, stride_n, stride_k, T, TT, FULL, BESIDE)
    tiles = tl.load(x + places, mask=exist, other=0.0).to(tl.float32)
    if CENTRE:
        tiles = tl.where(exist, tiles - _row_means(tiles, k, T, TT), 0.0)
    scale = tl.rsqrt(_row_means(tiles * tiles, k, T, TT) + eps)
    return tl.where(exist, tiles * scale, 0.0), scale, places, exist  # a row that does not exist may have 0·∞


@triton.jit
def _norm_encode(
    x, stride_b, stride_n, stride_k, n, k, N, P, K,
    gain, shift, eps, matrix, channels,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BESIDE: tl.constexpr, CENTRE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    tiles, _, _, exist = _load_normalised(
        x, stride_b, stride_n, stride_k, n, k, N, P, p, j, eps, T, TT, FULL, BESIDE, CENTRE
    )  # fmt: skip
    tiles *= by_column(gain, j, k, T, TT)
    if SHIFT:
        tiles = tl.where(exist, tiles + by_column(shift, j, k, T, TT), 0.0)
    encoded = multiply(load_basis(matrix, R, T, RP, TT), tiles.to(matrix.dtype.element_ty), None, PRECISION)
    places, exist = channel_places(p, j, N, P, K, K, R, RP, S, FULL, BESIDE)
    tl.store(channels + places, encoded.to(channels.dtype.element_ty), mask=exist)


@triton.jit
def _norm_encode_backward(
    x, stride_b, stride_n, stride_k, n, k, N, P, K,
    gain, shift, eps, matrix, gradient, dx, dx_b, dx_n, dx_k, products, dgain, dshift,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BESIDE: tl.constexpr, CENTRE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of tiles, one after the other."""
    pid = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    basis = load_basis(matrix, R, T, RP, TT)
    gains = by_column(gain, j, k, T, TT)
    product = tl.zeros((RP, TT), tl.float32)
    gain_sum = tl.zeros((TT, BLOCK), tl.float32)
    shift_sum = tl.zeros((TT, BLOCK), tl.float32)
    for step in range(ROWS):
        p = pid * ROWS + step
        unit, scale, _, exist = _load_normalised(
            x, stride_b, stride_n, stride_k, n, k, N, P, p, j, eps, T, TT, FULL, BESIDE, CENTRE
        )  # fmt: skip
        tiles = unit * gains
        if SHIFT:
            tiles = tl.where(exist, tiles + by_column(shift, j, k, T, TT), 0.0)
        tiles = tiles.to(matrix.dtype.element_ty)
        places, exist_coded = channel_places(p, j, N, P, K, K, R, RP, S, FULL, BESIDE)
        coded = tl.load(gradient + places, mask=exist_coded, other=0.0)
        again = multiply(basis, tiles, None, PRECISION)
        tl.store(gradient + places, again.to(gradient.dtype.element_ty), mask=exist_coded)  # `coded` has been read
        product = multiply(coded, tl.trans(tiles), product, PRECISION)
        dtiles = tl.where(exist, multiply(tl.trans(basis), coded, None, PRECISION), 0.0)
        gain_sum += dtiles * unit
        shift_sum += dtiles
        dtiles *= gains
        inner = dtiles - unit * _row_means(dtiles * unit, k, T, TT)
        if CENTRE:
            inner -= _row_means(dtiles, k, T, TT)
        places, exist = tile_places(p, j, N, P, n, k, dx_b, dx_n, dx_k, T, TT, FULL, BESIDE)
        tl.store(dx + places, (inner * scale).to(dx.dtype.element_ty), mask=exist)
    store_product(product, products, pid, R, T, RP, TT)
    store_column_sums(gain_sum, dgain, pid, j, k, T, TT)
    if SHIFT:
        store_column_sums(shift_sum, dshift, pid, j, k, T, TT)


@operator("norm_encode_gemm")
def _norm_encode_gemm(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    encoder: Tensor,
    eps: float,
    centre: bool,
    rows_first: bool,
) -> Tensor:
    """x (B, n, k), or (n, B, k) where `rows_first`, of any precision; gain and shift (k,); weight (r, K, M); encoder
    (r, t²) → channels (r, P, M) of (x − μ)/σ·gain + shift, of x/√(mean x²)·gain where not `centre`."""
    samples, tile = sample_view(x, rows_first), tile_of(encoder)
    gain, shift = gain.contiguous(), contiguous(shift)
    tiling = Tiling.of(samples, tile)
    channels = weight.new_empty(len(encoder), tiling.rows, tiling.columns)
    if channels.numel():
        with torch.cuda.device_of(x):
            _norm_encode[(tiling.rows,)](
                samples, *samples.stride(), *tiling.sizes(), gain, shift, eps, encoder.contiguous(), channels,
                **_constants(tiling, encoder, centre, shift, _grid(tiling, 1)),
            )  # fmt: skip
    return torch.bmm(channels, weight)


@_norm_encode_gemm.register_fake
def _(x, gain, shift, weight, encoder, eps, centre, rows_first):
    return weight.new_empty(weight.shape[0], rows_of_tiles(x.shape, tile_of(encoder), rows_first), weight.shape[2])


@operator("norm_encode_gemm_backward")
def _norm_encode_gemm_backward(
    gradient: Tensor,
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    encoder: Tensor,
    eps: float,
    centre: bool,
    rows_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gain, shift (empty where there is none), weight and encoder."""
    samples, tile = sample_view(x, rows_first), tile_of(encoder)
    gain, shift = gain.contiguous(), contiguous(shift)
    tiling = Tiling.of(samples, tile)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dsamples = sample_view(dx, rows_first)
    channels = torch.bmm(gradient, weight.mT)
    grid = _grid(tiling, 1024)
    products = x.new_empty(grid.programs, *encoder.shape, dtype=torch.float32)
    dgain = x.new_empty(grid.programs, tiling.k, dtype=torch.float32)
    dshift = None if shift is None else torch.empty_like(dgain)
    if channels.numel():
        with torch.cuda.device_of(x):
            _norm_encode_backward[(grid.programs,)](
                samples, *samples.stride(), *tiling.sizes(), gain, shift, eps, encoder.contiguous(),
                channels, dsamples, *dsamples.stride(), products, dgain, dshift,
                **_constants(tiling, encoder, centre, shift, grid),
            )  # fmt: skip
    return (
        dx,
        add_up(dgain, gain.dtype),
        gain.new_empty(0) if dshift is None else add_up(dshift, gain.dtype),
        weight_gradient(channels, gradient),
        add_up(products, encoder.dtype),
    )


@_norm_encode_gemm_backward.register_fake
def _(gradient, x, gain, shift, weight, encoder, eps, centre, rows_first):
    like = [torch.empty_like(of, memory_format=torch.contiguous_format) for of in (x, gain, weight, encoder)]
    return *like[:2], gain.new_empty(0 if shift is None else gain.shape), *like[2:]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.centre, ctx.rows_first = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.stl.norm_encode_gemm_backward(
        gradient.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.centre, ctx.rows_first
    )
    return *wanted(gradients, ctx.needs_input_grad), None, None, None


_norm_encode_gemm.register_autograd(_differentiate, setup_context=_keep)
_norm_encode_gemm_backward.register_autograd(only_once)
register_autocast(_norm_encode_gemm, 3, 4)


@register_flop_formula(torch.ops.stl.norm_encode_gemm)
def _(x, gain, shift, weight, encoder, eps, centre, rows_first, **_) -> int:
    coded, core = encode_gemm_macs(rows_of_tiles(x, round(encoder[1] ** 0.5), rows_first), weight, encoder)
    return 2 * (coded + core)


@register_flop_formula(torch.ops.stl.norm_encode_gemm_backward)
def _(gradient, x, gain, shift, weight, encoder, *_, **__) -> int:
    coded, core = encode_gemm_macs(gradient[1], weight, encoder)
    return 2 * (3 * coded + 2 * core)


def _grid(tiling: Tiling, most_rows: int) -> Grid:
    """Whole rows of tiles for each program."""
    block = padded(tiling.groups)
    rows = divide(tiling._replace(columns=block * tiling.group), block, 1, PROGRAMS, most_rows).rows
    return Grid(block, rows, 4 if tiling.groups <= 64 else 8, 1, ceil(tiling.rows / rows))


def _constants(tiling: Tiling, encoder: Tensor, centre: bool, shift: Tensor | None, grid: Grid) -> dict[str, Any]:
    # Loads ahead of their use (num_stages) take registers that a whole row leaves no room for.
    more = {"CENTRE": centre, "SHIFT": shift is not None, "num_stages": 1}
    return {**constants(tiling, len(encoder), encoder.dtype, grid), **more}
