"""Triton kernels for `stl_linear`, and the rule that says where they are the faster choice."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from stl.errors import SettingError
from stl.precision import autocast_dtype

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILES = (2, 4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_NORMALISED_TILES = 256  # in a row of tiles, which one program then holds
HIGHEST_RANK = 64  # the channels of a block of tiles stay in registers


def use_triton(backend: str, x: Tensor, tile: int, rank: int) -> bool:
    """Whether the kernels take this call; "auto" leaves it to the reference until a measured rule says otherwise.

    Raises SettingError where backend="triton" is impossible.
    """
    if backend != "triton":
        return False
    for name, value, allowed in (("tile", tile, TILES), ("dtype", autocast_dtype(x) or x.dtype, DTYPES)):
        if value not in allowed:
            choices = ", ".join(str(choice) for choice in allowed)
            raise SettingError(f"backend='triton' has no {name} {value}, only {choices}; use backend='auto'")
    if rank > HIGHEST_RANK:
        raise SettingError(f"backend='triton' has ranks to {HIGHEST_RANK}, not {rank}; use backend='auto'")
    if not HAS_TRITON:
        raise SettingError("backend='triton' needs the package triton, which is not installed; use backend='auto'")
    if not (x.is_cuda or INTERPRETED):
        raise SettingError(
            f"backend='triton' needs tensors on a GPU, x is on {x.device}; use backend='auto', or set "
            "TRITON_INTERPRET=1 before Python starts, which runs kernels on the CPU, very slowly"
        )
    return True
