"""Approximate and exact bases found by alternating least squares: the smallest error known here at S ≤ 64.

als.json beside this file is a table by `scripts/find_bases.py`; each basis keeps its error, its S and how it was found,
or which published one it is.
The exact ones are exact over the rationals (stl/cp/discretise.py). Published decompositions are among the starts of the
search, and at t = 2, r = 7 and t = 4, r = 48 and 49 nothing better exists or was found: these three are `strassen` and
`exact48`, whose source and licence exact48.json has.
"""

from functools import cache
from importlib.resources import as_file, files

from stl.basis import Basis, register_basis
from stl.cp.table import read_entry, read_rows


@cache
def _rows() -> dict[tuple[int, int], dict]:
    with as_file(files(__package__) / "als.json") as path:
        return {(row["tile"], row["rank"]): row for row in read_rows(path)}


@register_basis("als", ranks=lambda tile: [rank for size, rank in _rows() if size == tile])
def als(tile: int, rank: int) -> Basis:
    return read_entry(_rows()[tile, rank], "stl/bases/als.json").basis
