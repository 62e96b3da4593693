"""Strassen-Tile (STL) layers: a bilinear operator in the place of matrix multiplication.

Reference: Ailon, Bercovich, Uffenheimer, Weinstein, "Changing Base Without Losing Pace: A GPU-Efficient Alternative to
MatMul in DNNs", arXiv 2503.12211.
"""

from importlib import import_module

from stl import bases as bases  # registers the families
from stl import kernels
from stl.attention import STLMultiheadAttention
from stl.basis import Basis, get_basis, list_bases, register_basis
from stl.blocks import STLBlock, fuse_blocks
from stl.convert import ConversionReport, convert
from stl.errors import SettingError
from stl.flops import FlopReport, count_flops
from stl.functional import stl_linear, stl_matmul
from stl.linear import STLLinear, encode_weights
from stl.mlp import STLMLP
from stl.mlps import fuse_mlps
from stl.norm_linear import STLNormLinear
from stl.normalisation import Norm
from stl.streaming import Streaming

__all__ = [
    "STLMLP",
    "Basis",
    "ConversionReport",
    "FlopReport",
    "Norm",
    "STLBlock",
    "STLLinear",
    "STLMultiheadAttention",
    "STLNormLinear",
    "SettingError",
    "Streaming",
    "convert",
    "count_flops",
    "encode_weights",
    "fuse_blocks",
    "fuse_mlps",
    "get_basis",
    "list_bases",
    "register_basis",
    "stl_linear",
    "stl_matmul",
]

if kernels.HAS_TRITON:  # FlopCounterMode and torch.export know the operators that are registered before they begin
    import_module("stl.kernels.mlp")
