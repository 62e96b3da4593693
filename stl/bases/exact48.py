"""Exact 4×4 matrix multiplication in 48 products, with dyadic rational coefficients: S = 8, half of Strassen's squared.

The table is the 4x4x4 scheme of rank 48 by Dumas, Pernet and Sedoglavic (2025), file 4x4x4_48_accurate of plinopt
(CeCILL-B); exact48.json beside this file keeps its source with it, and the error and S that it has.
"""

from functools import partial

from stl.basis import Basis, register_basis
from stl.cp.table import shipped_basis, shipped_ranks


@register_basis("exact48", ranks=partial(shipped_ranks, "exact48"))
def exact48(tile: int, rank: int) -> Basis:
    return shipped_basis("exact48", tile, rank)
