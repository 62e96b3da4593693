"""The file of bases that a search writes and a family reads: JSON, floats in full, a row of a matrix a line."""

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from stl.basis import Basis
from stl.errors import SettingError

ROLES = ("encode_x", "encode_w", "decode")


@dataclass(frozen=True, eq=False)
class Entry:
    """A basis of the table, its error and S as the file says them, and how it was found."""

    basis: Basis
    error: float
    amplification: float
    provenance: dict[str, Any]


Table = dict[tuple[int, int], Entry]  # by (tile, rank)


def read_head(row: Any, where: str) -> tuple[int, int, str]:
    """(tile, rank, `where` with the two); raises SettingError, which begins with `where`, if a field that every row has
    is missing or of another kind."""
    if not isinstance(row, dict):
        raise SettingError(f"{where} is not an object with tile, rank, error, amplification, provenance and matrices")
    for key, kind in (("tile", int), ("rank", int), ("error", float), ("amplification", float), ("provenance", dict)):
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), (int, float) if kind is float else kind):
            raise SettingError(f"{where}: {key}={row.get(key)!r} is missing or wrong; find it again")
    tile, rank = row["tile"], row["rank"]
    check_size(tile, rank, f"{where}: ")
    return tile, rank, f"{where}, tile={tile} rank={rank}"


def verify(row: dict, basis: Basis, where: str) -> None:
    """Raises SettingError, which begins with `where`, if error and S of the row are not those of the basis."""
    for key in ("error", "amplification"):
        said, is_ = row[key], getattr(basis, key)
        if not abs(said - is_) <= 1e-9 * abs(is_) + 1e-20:
            raise SettingError(f"{where}: {key} is said to be {said!r} and is {is_!r}; the matrices were changed")


def read_entry(row: Any, where: str, name: str = "als") -> Entry:
    """The entry of a row, its basis of the family `name`.

    Raises SettingError, which begins with `where`, if a field is missing or of another kind, a matrix has another shape
    or a value that is not finite, or error and S are not those of the matrices.
    """
    tile, rank, where = read_head(row, where)
    matrices = []
    for role in ROLES:
        try:
            matrices.append(torch.tensor(row[role], dtype=torch.float64))
        except (KeyError, TypeError, ValueError):
            raise SettingError(f"{where}: {role} is not {rank} rows of {tile**2} numbers; find it again") from None
    try:
        basis = Basis(name, tile, rank, *matrices)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    verify(row, basis, where)
    return Entry(basis, row["error"], row["amplification"], row["provenance"])


def check_size(tile: int, rank: int, where: str = "") -> None:
    """Raises SettingError where no decomposition of this rank can be wanted."""
    if tile < 1:
        raise SettingError(f"{where}tile={tile} must be a positive whole number")
    if not 1 <= rank <= tile**3:
        raise SettingError(
            f"{where}rank={rank} must lie between 1 and t³ = {tile**3}, at which tile={tile} is plain multiplication"
        )


def read_rows(path: Path) -> list[Any]:
    """The rows of a table's file as they stand there; raises SettingError if it is not one."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise SettingError(f"the table of bases {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"the table of bases {str(path)!r} is no JSON: {error}") from None
    rows = content.get("bases") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise SettingError(f'the table of bases {str(path)!r} has no list "bases"; find_bases.py writes one')
    return rows


def by_size(rows: list[Any], where: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Rows by (tile, rank); raises SettingError, which begins with `where`, if the head of one is wrong, or a size
    stands there twice."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for i, row in enumerate(rows):
        tile, rank, _ = read_head(row, f"{where}, basis {i}")
        if (tile, rank) in found:
            raise SettingError(f"{where} has tile={tile} rank={rank} twice; remove one")
        found[tile, rank] = row
    return found


def read_table(path: Path) -> Table:
    """All bases of a table, verified; raises SettingError if anything in it is wrong, or a size stands there twice."""
    rows = by_size(read_rows(path), repr(str(path)))
    return {size: read_entry(row, f"{str(path)!r}, basis {i}") for i, (size, row) in enumerate(rows.items())}


@cache
def shipped(name: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The rows of stl/bases/<name>.json by (tile, rank); raises SettingError if it is no table."""
    with as_file(files("stl.bases") / f"{name}.json") as path:
        return by_size(read_rows(path), f"stl/bases/{name}.json")


def shipped_ranks(name: str, tile: int) -> list[int]:
    return [rank for size, rank in shipped(name) if size == tile]


def shipped_basis(name: str, tile: int, rank: int) -> Basis:
    """The basis of this size in stl/bases/<name>.json; raises SettingError if anything in its row is wrong."""
    return read_entry(shipped(name)[tile, rank], f"stl/bases/{name}.json", name).basis


def entry_of(basis: Basis, provenance: dict[str, Any]) -> Entry:
    return Entry(basis, basis.error, basis.amplification, provenance)


def write_table(path: Path, table: Table, about: str) -> None:
    """The same bases give the same bytes."""
    rows = []
    for _, entry in sorted(table.items()):
        basis = entry.basis
        head: dict[str, Any] = {"tile": basis.tile, "rank": basis.rank, "error": entry.error}
        head |= {"amplification": entry.amplification, "provenance": entry.provenance}
        fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for role in ROLES:
            lines = ",\n".join(json.dumps(line) for line in getattr(basis, role).tolist())
            fields.append(f'"{role}": [\n{lines}]')
        rows.append("{" + ",\n".join(fields) + "}")
    write_rows(path, rows, about)


def write_rows(path: Path, rows: list[str], about: str) -> None:
    """What `read_rows` reads, `rows` in JSON already; under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"about": {json.dumps(about)},\n"bases": [\n' + ",\n".join(rows) + "\n]}\n")
    os.replace(temporary, path)
