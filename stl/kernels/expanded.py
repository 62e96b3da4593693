"""A narrow layer as the one product that it is, which a GPU computes while it moves what goes in and out.

For t rows X (t, k) a layer is a matrix on all of their entries, Σ_q decoder_q ⊗ weight_q ⊗ encoder_q (t·m, t·k) in the
order of tiles. It costs t·k·m MACs a row of X instead of r·k·m/t², and the encodes and decodes; but what these would
write and read again stays where it is. Only speed is gained by it: `stl.count_flops` counts the layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stl.kernels.autocast import as_autocast
from stl.kernels.operators import tile_of
from stl.precision import autocast_dtype, without_autocast

DTYPES = (torch.bfloat16, torch.float16)
# MACs that a GPU computes while it moves a number, in these precisions: 780 TFLOP/s and 4.2 TB/s of an H200.
BALANCE = 186
# Numbers that it moves while the matrix of a layer is built, in 26 µs of a CUDA graph.
BUILDING = 5.5e7


def is_expanded(
    x: Tensor, tile: int, rank: int, layers: Sequence[tuple[int, int]], row_axis: str, beside: int = 0
) -> bool:
    """Whether layers of so many features in and out are faster, each as one product, than by kernels for all of them.

    x (..., n, ·) is what the first takes. They are where their MACs and their matrices take less time than encode,
    products and decode take to move, for each row, features in and out, and twice the encoded tiles and the channels,
    of r numbers for each t² of theirs. Counted is the forward pass; measured, it holds with the backward pass as well.
    `beside`: features, within an MLP or behind a norm, that kernels for all of this neither write nor read; as one
    product layers do, and so does the activation or the norm, in a pass of its own. Rows must be whole tiles, and x of
    16 bits, as autocast has it. Where their number is not fixed, in compiled code, there are taken to be many.
    """
    if row_axis != "tokens" or (autocast_dtype(x) or x.dtype) not in DTYPES:
        return False
    *lead, n, _ = x.shape
    numbers = sum(k + m for k, m in layers) * (1 + 2 * rank / tile**2) - 2 * beside
    numbers -= sum(tile * k * m / BALANCE + _copied(tile, k, m) for k, m in layers)
    if numbers <= 0 or not _known(n % tile == 0):
        return False
    few = int(BUILDING * len(layers) / numbers)
    return not _known(math.prod(lead) * n <= few)


def _known(condition: bool) -> bool:
    """Whether it is true of all sizes that compiled code is for; it is not made to depend on the answer."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes as long as all of this package

    return statically_known_true(condition)


def _copied(tile: int, k: int, m: int) -> int:
    """Numbers of a row that are moved where zeros fill what goes in, or leave what comes out; compiled code has them
    where it writes what comes before, and reads what comes after."""
    if torch.compiler.is_compiling():
        return 0
    return 3 * k * (_missing(tile, k, 2) > 0) + 2 * m * (_missing(tile, m, 2) > 0)


def _missing(tile: int, features: int, size: int) -> int:
    """How many features more make t rows, in numbers of `size` bytes, a multiple of 16 bytes, without which cuBLAS
    takes several times as long."""
    return -features % max(1, 16 // size // tile)


def expand(weight: Tensor, encoder: Tensor, decoder: Tensor, k: int, m: int) -> Tensor:
    """weight (r, K, M), encoder and decoder (r, t²) → the matrix (t·m, t·k) that takes t rows of k features, in one
    row, to t rows of m. Of more features than tiles have, which are zero, k and m may count some."""
    (rank, K, M), tile = weight.shape, tile_of(encoder)
    pairs = (decoder[:, :, None] * encoder[:, None, :]).view(rank, -1)
    entries = (pairs.T @ weight.reshape(rank, -1)).view(tile, tile, tile, tile, K, M)
    whole = entries.permute(0, 5, 1, 2, 4, 3).reshape(tile, M * tile, tile, K * tile)
    if (m, k) != whole.shape[1::2]:
        whole = F.pad(whole, (0, k - K * tile, 0, 0, 0, m - M * tile))
    return whole.reshape(tile * m, tile * k)


def expanded_linear(
    x: Tensor,
    weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    out_features: int,
    residual: Tensor | None,
) -> Tensor:
    """`stl.functional.stl_linear` with row_axis="tokens" for x (..., n, k), n a multiple of t, and arguments that it
    has checked. The matrix is computed in float32, and rounded once."""
    tile, dtype = tile_of(encoder), autocast_dtype(x) or x.dtype
    *lead, n, k = x.shape
    more_in, more_out = (_missing(tile, features, dtype.itemsize) for features in (k, out_features))
    precise = torch.promote_types(dtype, torch.float32)
    with without_autocast(x):
        coded = [tensor.to(precise) for tensor in (weight, encoder, decoder)]
        matrix = expand(coded[0], coded[1], coded[2], k + more_in, out_features + more_out)
    x, matrix, bias = as_autocast(x, x, matrix, bias)
    # By two axes, since compiled code copies what more than two are flattened of.
    rows = _lengthened(x, more_in).reshape(math.prod(lead) * n // tile, tile * (k + more_in))
    y = F.linear(rows, matrix, None if bias is None else _lengthened(bias, more_out).repeat(tile))
    y = y.reshape(*lead, n, out_features + more_out)[..., :out_features].contiguous()
    return y if residual is None else y + residual


def _lengthened(x: Tensor, more: int) -> Tensor:
    """With so many zeros after its features; `F.pad` copies where none are to come."""
    return F.pad(x, (0, more)) if more else x
