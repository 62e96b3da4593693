"""The Strassen-Tile product in plain PyTorch: the specification that every kernel is tested against.

Shapes are named once here: n rows (tokens) of X, k its columns (features), m columns of W, tile t, rank r, and
N = ⌈n/t⌉, K = ⌈k/t⌉, M = ⌈m/t⌉. Sizes that t does not divide are padded with zeros and cut off again.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from stl import kernels
from stl.basis import Basis
from stl.errors import SettingError
from stl.precision import autocast_dtype

ROW_AXES = ("tokens", "batch")


def _side(entries: int) -> int:
    """t for the t² entries of a tile, rounded up; counted, since torch.compile cannot trace isqrt of a dynamic size."""
    tile = 1
    while tile**2 < entries:
        tile += 1
    return tile


def to_tiles(x: Tensor, tile: int) -> Tensor:
    """Cut x (..., n, k) into vectorised tiles (t², ..., N, K), row-major inside a tile, zero-padded.

    The tile's entries come first, so that encoding is one matrix product whose result has contiguous channels.
    """
    n, k = x.shape[-2:]
    if torch.compiler.is_compiling() or n % tile or k % tile:  # padding nothing copies, but where it is compiled
        x = F.pad(x, (0, -k % tile, 0, -n % tile))
    x = x.view(*x.shape[:-2], x.shape[-2] // tile, tile, x.shape[-1] // tile, tile)
    if torch.compiler.is_exporting():  # one copy of them all would guard strides, and with these a dynamic batch
        return torch.stack([entries for row in x.unbind(-3) for entries in row.unbind(-1)])
    return x.movedim((-3, -1), (0, 1)).flatten(0, 1)


def from_tiles(tiles: Tensor, n: int, m: int) -> Tensor:
    """Inverse of `to_tiles`: (t², ..., N, M) to (..., n, m), the padding cut off."""
    tile = _side(tiles.shape[0])
    y = tiles.view(tile, tile, *tiles.shape[1:]).movedim((0, 1), (-3, -1))
    return y.flatten(-2).flatten(-3, -2)[..., :n, :m]


def encode_weight(w: Tensor, encode_w: Tensor) -> Tensor:
    """Encode a dense matrix w (k, m) with encode_w (r, t²): the `weight` of `stl_linear`, shape (r, K, M)."""
    return torch.einsum("rc,cKM->rKM", encode_w, to_tiles(w, _side(encode_w.shape[1])))


def stl_linear(
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    row_axis: str = "tokens",
    out_features: int | None = None,
    backend: str = "auto",
    residual: Tensor | None = None,
) -> Tensor:
    """Y_IJ = unvec(decoderᵀ · Σ_K (encoder·vec(X_IK)) ⊙ weight[:, K, J]) + bias: encode, r GEMMs, decode.

    Args:
        x: (..., n, k). The t rows of a tile are t neighbours along axis −2 and mix where the basis is not exact.
        weight: (r, K, M), the weight already encoded.
        encoder, decoder: (r, t²).
        bias: (m,) or None.
        row_axis: "tokens" cuts the tiles along axis −2; "batch" along axis 0, so that a tile holds t samples at one
            position and nothing passes between positions.
        out_features: m, at most M·t. By default the length of the bias, else M·t.
        backend: "torch" is this reference, "triton" the kernels; "auto" picks the faster.
        residual: (..., n, m), added to Y. Under autocast it stays as precise as it is, and the sum is.

    Returns:
        (..., n, m), contiguous.

    Raises:
        SettingError: shapes, dtypes or devices that do not fit each other; an unknown row_axis; a backend that is
            unknown or cannot run here.
    """
    tile, out_features = check_arguments(x, weight, encoder, decoder, bias, row_axis, out_features)
    check_residual(residual, x, out_features)
    rank = weight.shape[0]
    if kernels.use_triton(backend, x, tile, rank, out_features):
        from stl.kernels.linear import linear  # needs triton

        return linear(x, weight, encoder, decoder, bias, row_axis, out_features, residual)
    if row_axis == "batch":
        x = x.movedim(0, -2)
    n = x.shape[-2]
    tiles = to_tiles(x, tile)  # (t², ..., N, K)
    shape = tiles.shape[1:-1]
    channels = (encoder @ tiles.flatten(1)).view(rank, prod(shape), tiles.shape[-1])
    channels = torch.bmm(channels, weight)  # (r, ·N, M)
    decoded = decoder.T @ channels.flatten(1)  # (t², ·N·M)
    y = from_tiles(decoded.view(tile**2, *shape, weight.shape[-1]), n, out_features)
    if row_axis == "batch":
        y = y.movedim(-2, 0)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (y if residual is None else y + residual).contiguous()


def stl_matmul(x: Tensor, w: Tensor, basis: Basis) -> Tensor:
    """≈ x @ w for x (..., n, k) and w (k, m), exactly so where `basis.exact`.

    Raises SettingError where the inner sizes differ.
    """
    if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0]:
        raise SettingError(f"stl_matmul needs x (..., n, k) and w (k, m); got {tuple(x.shape)} and {tuple(w.shape)}")
    encode_x, encode_w, decode = (m.to(x) for m in (basis.encode_x, basis.encode_w, basis.decode))
    return stl_linear(x, encode_weight(w, encode_w), encode_x, decode, out_features=w.shape[1])


def check_arguments(
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    row_axis: str,
    out_features: int | None,
) -> tuple[int, int]:
    """Validate the arguments of `stl_linear` but for its backend; returns (tile, out_features)."""
    if row_axis not in ROW_AXES:
        raise SettingError(f"row_axis={row_axis!r} is unknown; choose one of {', '.join(ROW_AXES)}")
    if weight.ndim != 3 or encoder.ndim != 2 or encoder.shape != decoder.shape or encoder.shape[0] != weight.shape[0]:
        raise SettingError(
            "stl_linear needs weight (r, K, M), encoder (r, t²) and decoder (r, t²); got "
            f"{tuple(weight.shape)}, {tuple(encoder.shape)} and {tuple(decoder.shape)}"
        )
    others = [weight, encoder, decoder, *([] if bias is None else [bias])]
    if any(tensor.device != x.device for tensor in others):
        devices = ", ".join(dict.fromkeys(str(tensor.device) for tensor in (x, *others)))
        raise SettingError(f"stl_linear needs all tensors on one device; got {devices}")
    if autocast_dtype(x) is None:
        alike = x.is_floating_point() and all(tensor.dtype == x.dtype for tensor in others)
    else:  # it turns all of them to one, but for float64
        alike = all(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in (x, *others))
    if not alike:
        dtypes = ", ".join(dict.fromkeys(str(tensor.dtype) for tensor in (x, *others)))
        raise SettingError(f"stl_linear needs floating-point tensors of one dtype, outside of autocast; got {dtypes}")
    _, blocks, out_blocks = weight.shape
    tile = _side(encoder.shape[1])
    if tile**2 != encoder.shape[1]:
        raise SettingError(f"encoder has {encoder.shape[1]} columns; a square number t² is needed")
    if x.ndim < 2 or -(-x.shape[-1] // tile) != blocks:
        raise SettingError(
            f"x has shape {tuple(x.shape)}; with tile {tile} this weight takes (..., n, k) with k from "
            f"{(blocks - 1) * tile + 1} to {blocks * tile}"
        )
    if out_features is None:
        out_features = out_blocks * tile if bias is None else len(bias)
    if -(-out_features // tile) != out_blocks or (bias is not None and bias.shape != (out_features,)):
        got = "no bias" if bias is None else f"bias {tuple(bias.shape)}"
        raise SettingError(
            f"out_features={out_features} with {got}; with tile {tile} this weight gives "
            f"{(out_blocks - 1) * tile + 1} to {out_blocks * tile} features and a bias of the same length"
        )
    return tile, out_features


def check_residual(residual: Tensor | None, x: Tensor, out_features: int) -> None:
    """Raises SettingError where it is not what a layer gives for x: in shape, device or kind of numbers."""
    if residual is None:
        return
    shape = (*x.shape[:-1], out_features)
    if residual.shape != shape or residual.device != x.device or not residual.is_floating_point():
        got = f"{tuple(residual.shape)}, {residual.dtype}, on {residual.device}"
        raise SettingError(f"residual must be floating-point {shape} on {x.device}, as what it is added to; got {got}")
