"""Triton kernels for `stl_linear`, and the rule that says where they are the faster choice."""

import os
from importlib import import_module

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stl.errors import SettingError
from stl.precision import autocast_dtype


def _has_triton() -> bool:
    """Whether it is there and in order; where it is not, the reference computes everything, and nothing is said."""
    try:
        import_module("triton.language")  # more than a folder of that name
    except Exception:
        return False
    return True


HAS_TRITON = _has_triton()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# In a row of tiles, which one program then holds, by t; without and with gradients, of which a program holds more.
MOST_NORMALISED_TILES = {2: (2048, 1024), 4: (512, 256), 8: (32, 32)}
HIGHEST_RANK = {2: 8, 4: 64, 8: 64}  # by t; the channels of a block of tiles stay in registers
TILES = tuple(HIGHEST_RANK)
LEAST_WORK, LEAST_WORK_OF_TRAINING = 2**24, 2**26


def use_triton(backend: str, x: Tensor, tile: int, rank: int, out_features: int | None = None) -> bool:
    """Whether the kernels take this call; "auto" leaves to the reference what is slower by them, or impossible.

    Without `out_features`, of the layer, there are as many as x has.

    Raises SettingError for an unknown backend, and where backend="triton" is impossible.
    """
    if backend not in BACKENDS:
        raise SettingError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return False
    dtype = autocast_dtype(x) or x.dtype
    reason = _impossible(x, dtype, tile, rank)
    if backend == "auto":
        if reason or not x.is_cuda:
            return False
        # The CPU's time counts only where what it launches is not recorded.
        recorded = torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
        work = None if recorded else encoded_numbers(x, tile, rank, out_features)
        return is_faster(dtype, rank, work, torch.is_grad_enabled())
    if reason:
        raise SettingError(f"backend='triton' {reason}")
    return True


def holds_rows(tile: int, features: int) -> bool:
    """Whether a program can hold a row of tiles of so many features, and so normalise it."""
    without, with_gradients = MOST_NORMALISED_TILES.get(tile, (0, 0))
    return -(-features // tile) <= (with_gradients if torch.is_grad_enabled() else without)


def encoded_numbers(x: Tensor, tile: int, rank: int, out_features: int | None) -> int:
    """How many the encoded input has, or the channels behind the products, whichever are fewer."""
    features = x.shape[-1] if x.ndim else 1
    narrower = features if out_features is None else min(features, out_features)
    return x.numel() * rank * narrower // max(1, features * tile**2)


def is_faster(dtype: torch.dtype, rank: int, work: int | None, training: bool) -> bool:
    """The rule of "auto", measured on an H200: whether the kernels are faster than the reference.

    As the GPU's work they are, but for float32 products of more than 32 channels. Called one by one (`work`: the
    `encoded_numbers`) they also cost the CPU more, up to a size; compiled, or in a CUDA graph, `work` is None. Of tiles
    of 8 the work was measured, in bf16 at r = 64; the size is that of tiles of 4.
    """
    if dtype == torch.float32 and rank > 32:
        return False
    return work is None or work >= (LEAST_WORK_OF_TRAINING if training else LEAST_WORK)


def _impossible(x: Tensor, dtype: torch.dtype, tile: int, rank: int) -> str | None:
    """Why the kernels cannot take this call."""
    for name, value, allowed in (("tile", tile, TILES), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            return f"has no {name} {value}, only {', '.join(str(choice) for choice in allowed)}; use backend='auto'"
    if rank > HIGHEST_RANK[tile]:
        return f"has ranks to {HIGHEST_RANK[tile]} with tile={tile}, not {rank}; use backend='auto'"
    # The operators would lose tangents silently.
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "has no forward-mode derivatives and no transforms of torch.func; use backend='auto'"
    if not HAS_TRITON:
        return "needs the package triton, which is not installed, or broken; use backend='auto'"
    if INTERPRETED:
        return None
    if not x.is_cuda:
        return (
            f"needs tensors on a GPU, x is on {x.device}; use backend='auto', or set TRITON_INTERPRET=1 before Python "
            "starts, which runs kernels on the CPU, very slowly"
        )
    if not torch.cuda.is_available():
        return f"needs a GPU, and there is none; x, on {x.device}, has no numbers; use backend='auto'"
    if torch.version.hip or torch.cuda.get_device_properties(x.device).major < 8:
        return "needs an NVIDIA GPU of compute capability 8.0 or above; use backend='auto'"
    return None
