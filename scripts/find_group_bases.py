"""Search for the index maps of the family `group`: every abelian group whose real rank is at most t³.

    python scripts/find_group_bases.py                                         # every size that ships, from nothing
    python scripts/find_group_bases.py --tile 4 --rank 16 --seed 1 --chains 256 --steps 6000 --table outputs/mine.json

Of the groups of one real rank the one of the lowest error goes into the table, of equal errors that of the lowest S, if
it is better than what stands there; a row keeps the command that found it. The same settings give the same maps on the
same machine. stl/cp/index_maps.py says how it searches.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from command_line import command_line
from rich.progress import track

from stl.bases.group import MAPS, abelian_groups, read_row, real_rank
from stl.cp.index_maps import Settings, search
from stl.cp.table import by_size, check_size, read_rows, write_rows
from stl.errors import SettingError

TILES = (2, 3, 4)  # what ships
NUMBERS = ("seed", "chains", "steps", "limit")
ABOUT = (
    "Index maps over abelian groups, by scripts/find_group_bases.py; stl/bases/group.py says what they mean. "
    "error = |T - T^|^2/t^3; amplification = S."
)

ROUNDING = 1e-9  # what two errors, or relatively two S, differ in by rounding at most

Rows = dict[tuple[int, int], dict[str, Any]]  # by (tile, rank)


def jobs(tiles: Iterable[int], ranks: list[int] | None) -> list[tuple[int, tuple[int, ...]]]:
    """(tile, group) to search; raises SettingError for a size out of range, or a rank that no group has."""
    found = []
    for tile in tiles:
        for rank in ranks or [1]:
            check_size(tile, rank)
        groups = abelian_groups(tile**3)
        exist = sorted(set(map(real_rank, groups)))
        for rank in ranks or []:
            if rank not in exist:
                raise SettingError(
                    f"--rank {rank} is the real rank of no abelian group; for --tile {tile} there are "
                    f"{', '.join(map(str, exist))}"
                )
        found += [(tile, orders) for orders in groups if not ranks or real_rank(orders) in ranks]
    return found


def found_by(todo: list[tuple[int, tuple[int, ...]]], settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for every job that ended within the limit on S."""
    provenance = {
        **{name: getattr(settings, name) for name in NUMBERS},
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    for tile, orders in todo:
        result = search(orders, tile, settings)
        if result is not None:
            basis, maps = result
            command = f"python scripts/find_group_bases.py --tile {tile} --rank {basis.rank} " + " ".join(
                f"--{name} {getattr(settings, name)}" for name in NUMBERS
            )
            row: dict[str, Any] = {"tile": tile, "rank": basis.rank, "error": basis.error}
            row |= {"amplification": basis.amplification, "provenance": {"command": command} | provenance}
            yield row | {"group": list(orders)} | {key: values.tolist() for key, values in zip(MAPS, maps, strict=True)}


def is_better(row: dict[str, Any], than: dict[str, Any] | None, limit: float) -> bool:
    """Whether its error is lower, or equal to rounding and its S lower; nothing above the limit on S is kept for good.

    `row` itself is within the limit, as all that a search finds.
    """
    if than is None or than["amplification"] > limit:
        return True
    if abs(row["error"] - than["error"]) > ROUNDING:
        return row["error"] < than["error"]
    return row["amplification"] < (1 - ROUNDING) * than["amplification"]


def read(path: Path) -> Rows:
    """The table, verified."""
    rows = by_size(read_rows(path) if path.exists() else [], repr(str(path)))
    for index, row in enumerate(rows.values()):
        read_row(row, f"{str(path)!r}, basis {index}")
    return rows


def write(path: Path, rows: Rows) -> None:
    lines = []
    for _, row in sorted(rows.items()):
        lines.append("{" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in row.items()) + "}")
    write_rows(path, lines, ABOUT)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tile", type=int, nargs="+", default=TILES, help="tile sizes")
    parser.add_argument("--rank", type=int, nargs="+", help="default: every real rank up to t³")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of all that is random")
    parser.add_argument("--chains", type=int, default=Settings.chains, help="side by side")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of annealing")
    parser.add_argument("--limit", type=float, default=Settings.limit, help="on S")
    parser.add_argument("--table", type=Path, default=Path("outputs/bases/group.json"), help="where the best are kept")
    given = parser.parse_args()
    try:
        settings = Settings(**{name: getattr(given, name) for name in NUMBERS})
        todo, table = jobs(given.tile, given.rank), read(given.table)
        torch.set_num_threads(1)  # small tensors gain nothing from more
        for row in track(found_by(todo, settings), "searching", total=len(todo)):
            size = row["tile"], row["rank"]
            if is_better(row, table.get(size), settings.limit):
                table[size] = row
                write(given.table, table)
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
    for (tile, rank), row in sorted(table.items()):
        name = "×".join(f"Z{order}" for order in row["group"]) or "Z1"
        said = f"error {row['error']:.4f} S {row['amplification']:.2f}, products {1 - rank / tile**3:.4f}"
        print(f"tile {tile} rank {rank}: {name} of order {math.prod(row['group'])}, {said}")


if __name__ == "__main__":
    main()
