"""LayerNorm or RMSNorm and encode in one pass: `stl::norm_encode_gemm`, and its gradient.

A program holds whole rows of tiles, so that it can normalise them. What is normalised never reaches memory: the
backward pass computes it again from x. Matrices are read and written as rows of features, (T, WIDTH), whose sums stay
within few warps, and become tiles, (TT, BLOCK), for products alone.
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
    READ_NEXT,
    Grid,
    Tiling,
    channel_places,
    constants,
    few_channels,
    load_basis,
    multiply,
    padded,
    rows_each,
    store_product,
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
def _as_tiles(rows, T: tl.constexpr, TT: tl.constexpr):
    """(T, WIDTH) → (TT, BLOCK), all groups of a row of tiles."""
    W: tl.constexpr = TT // T
    BLOCK: tl.constexpr = rows.shape[1] // W
    return tl.reshape(tl.permute(tl.reshape(rows, (T, BLOCK, W)), (0, 2, 1)), (TT, BLOCK))


@triton.jit
def _as_rows(tiles, T: tl.constexpr, TT: tl.constexpr):
    """Back again."""
    W: tl.constexpr = TT // T
    BLOCK: tl.constexpr = tiles.shape[1]
    return tl.reshape(tl.permute(tl.reshape(tiles, (T, W, BLOCK)), (0, 2, 1)), (T, BLOCK * W))


@triton.jit
def _row_places(p, c, N, P, n, k, stride_b, stride_n, stride_k, T: tl.constexpr, FULL: tl.constexpr):
    """Offsets (T, WIDTH) of the features c in the row of tiles p, and which of them exist; as `tile_places`."""
    row = (p % N) * T + tl.arange(0, T)[:, None]
    places = (p // N).to(tl.int64) * stride_b + row.to(tl.int64) * stride_n + c[None, :].to(tl.int64) * stride_k
    exist = tl.broadcast_to(c[None, :] < k, places.shape)
    return places, exist if FULL[0] else exist & (row < n) & (p < P)


@triton.jit
def _by_feature(vector, c, k, GIVEN: tl.constexpr):
    """A number for each of the k features, as float32 (1, WIDTH); 0 behind the last, and where none is given."""
    if GIVEN:
        return tl.load(vector + c, mask=c < k, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros((1, c.shape[0]), tl.float32)


@triton.jit
def _normalise(rows, exist, k, eps, CENTRE: tl.constexpr):
    """x̂ (T, WIDTH), and 1/σ of its rows (T, 1)."""
    if CENTRE:
        rows = tl.where(exist, rows - tl.sum(rows, 1, keep_dims=True) / k, 0.0)
    scale = tl.rsqrt(tl.sum(rows * rows, 1, keep_dims=True) / k + eps)
    return tl.where(exist, rows * scale, 0.0), scale  # a row that does not exist may have 0·∞


@triton.jit
def _norm_encode(
    x, stride_b, stride_n, stride_k, n, k, N, P, K,
    gain, shift, eps, matrix, channels,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BESIDE: tl.constexpr, CENTRE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """A program takes one row of tiles."""
    p = tl.program_id(0)
    c = tl.arange(0, BLOCK * (TT // T))
    places, exist = _row_places(p, c, N, P, n, k, stride_b, stride_n, stride_k, T, FULL)
    unit, _ = _normalise(tl.load(x + places, mask=exist, other=0.0).to(tl.float32), exist, k, eps, CENTRE)
    rows = tl.where(exist, unit * _by_feature(gain, c, k, True) + _by_feature(shift, c, k, SHIFT), 0.0)
    tiles = _as_tiles(rows.to(matrix.dtype.element_ty), T, TT)
    encoded = multiply(load_basis(matrix, R, T, RP, TT), tiles, None, PRECISION)
    coded_places, coded_exist = channel_places(p, tl.arange(0, BLOCK), N, P, K, K, R, RP, S, FULL, BESIDE)
    encoded = encoded.to(channels.dtype.element_ty)
    tl.store(channels + coded_places, encoded, mask=coded_exist, eviction_policy=READ_NEXT)


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
    WIDTH: tl.constexpr = BLOCK * (TT // T)
    c = tl.arange(0, WIDTH)
    basis = load_basis(matrix, R, T, RP, TT)
    gains, shifts = _by_feature(gain, c, k, True), _by_feature(shift, c, k, SHIFT)
    product = tl.zeros((RP, TT), tl.float32)
    gain_sum = tl.zeros((WIDTH,), tl.float32)
    shift_sum = tl.zeros((WIDTH,), tl.float32)
    for step in range(ROWS):
        p = pid * ROWS + step
        places, exist = _row_places(p, c, N, P, n, k, stride_b, stride_n, stride_k, T, FULL)
        unit, scale = _normalise(tl.load(x + places, mask=exist, other=0.0).to(tl.float32), exist, k, eps, CENTRE)
        rows = tl.where(exist, unit * gains + shifts, 0.0)
        tiles = _as_tiles(rows.to(matrix.dtype.element_ty), T, TT)
        coded_places, coded_exist = channel_places(p, tl.arange(0, BLOCK), N, P, K, K, R, RP, S, FULL, BESIDE)
        coded = tl.load(gradient + coded_places, mask=coded_exist, other=0.0)
        again = multiply(basis, tiles, None, PRECISION).to(gradient.dtype.element_ty)
        tl.store(gradient + coded_places, again, mask=coded_exist)  # `coded` has been read
        product = multiply(coded, tl.trans(tiles), product, PRECISION)
        drows = tl.where(exist, _as_rows(multiply(tl.trans(basis), coded, None, PRECISION), T, TT), 0.0)
        gain_sum += tl.sum(drows * unit, 0)
        shift_sum += tl.sum(drows, 0)
        drows *= gains
        inner = drows - unit * (tl.sum(drows * unit, 1, keep_dims=True) / k)
        if CENTRE:
            inner -= tl.sum(drows, 1, keep_dims=True) / k
        places, _ = _row_places(p, c, N, P, n, k, dx_b, dx_n, dx_k, T, FULL)
        tl.store(dx + places, (inner * scale).to(dx.dtype.element_ty), mask=exist)
    store_product(product, products, pid, R, T, RP, TT)
    _store_sums(gain_sum, dgain, pid, c, k)
    if SHIFT:
        _store_sums(shift_sum, dshift, pid, c, k)


@triton.jit
def _store_sums(sums, total, pid, c, k):
    """One program's share of sums over rows, (WIDTH,), to total (programs, k); as `store_column_sums`."""
    tl.store(total + pid.to(tl.int64) * k + c, sums, mask=c < k)


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
                **_constants(tiling, encoder, centre, shift, _grid(tiling, encoder, backward=False)),
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
    grid = _grid(tiling, encoder, backward=True)
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


def _grid(tiling: Tiling, encoder: Tensor, backward: bool) -> Grid:
    """Whole rows of tiles for each program; in the backward pass, where each leaves sums behind, several."""
    block = padded(tiling.groups)
    rows = rows_each(tiling.rows, PROGRAMS) if backward else 1
    # As few warps as have the registers, since sums over a row need not leave them then.
    few = few_channels(tiling, encoder.dtype, len(encoder))
    warps = block * tiling.group * tiling.tile**2 // 1024
    if not backward:
        warps = max(min(2, warps), warps // 2)
    if encoder.dtype == torch.float32:
        warps *= 4
    elif backward and not few:
        warps *= 2
    return Grid(block, rows, min(16, max(1 if few else 2, warps)), 1, ceil(tiling.rows / rows))


def _constants(tiling: Tiling, encoder: Tensor, centre: bool, shift: Tensor | None, grid: Grid) -> dict[str, Any]:
    # Loads ahead of their use (num_stages) take registers that a whole row leaves no room for.
    more = {"CENTRE": centre, "SHIFT": shift is not None, "num_stages": 1}
    return {**constants(tiling, len(encoder), encoder.dtype, grid), **more}
