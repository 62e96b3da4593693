"""Exact 4×4 matrix multiplication in 48 products, with dyadic rational coefficients: S = 8, half of Strassen's squared.

The table is the 4x4x4 scheme of rank 48 by Dumas, Pernet and Sedoglavic (2025), file 4x4x4_48_accurate of plinopt
(CeCILL-B); exact48.json beside this file keeps its source with it, and the error and S that it has.
"""

import json
from importlib.resources import files

import torch

from stl.basis import Basis, register_basis
from stl.cp.table import verify


@register_basis("exact48", ranks=lambda tile: [48] if tile == 4 else [])
def exact48(tile: int, rank: int) -> Basis:
    table = json.loads((files(__package__) / "exact48.json").read_text())
    matrices = (torch.tensor(table[role], dtype=torch.float64) for role in ("encode_x", "encode_w", "decode"))
    basis = Basis("exact48", table["tile"], table["rank"], *matrices)
    verify(table, basis, "stl/bases/exact48.json")
    return basis
