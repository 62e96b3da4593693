"""Approximate and exact bases found by alternating least squares: the smallest error known here at S ≤ 64.

als.json beside this file is a table by `scripts/find_bases.py`; each basis keeps its error, its S and how it was found,
or which published one it is.
The exact ones are exact over the rationals (stl/cp/discretise.py). Published decompositions are among the starts of the
search, and at t = 2, r = 7 and t = 4, r = 48 and 49 nothing better exists or was found: these three are `strassen` and
`exact48`, whose source and licence exact48.json has.
"""

from functools import partial

from stl.basis import Basis, register_basis
from stl.cp.table import shipped_basis, shipped_ranks


@register_basis("als", ranks=partial(shipped_ranks, "als"))
def als(tile: int, rank: int) -> Basis:
    return shipped_basis("als", tile, rank)
