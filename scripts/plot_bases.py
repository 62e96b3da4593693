"""Error and S of every basis against its rank, from the registered families alone.

python scripts/plot_bases.py                             # writes results/bases.{json,png}
python scripts/plot_bases.py --tile 4 --out outputs/bases
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from command_line import command_line

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from stl import get_basis, list_bases
from stl.basis import available_ranks
from stl.errors import SettingError

TILES, LARGEST = (2, 3, 4), 8  # a basis of a tile of 9 has up to 729 channels
DIGITS = 6  # significant ones: what processors differ in is beyond
ZERO = 1e-12  # errors below are rounding
YARDSTICK = "products"


def measure(name: str, tile: int, rank: int) -> dict[str, Any]:
    """One row: family, tile, rank, the relative squared error (0 for an exact basis), S, and whether it is exact."""
    basis = get_basis(name, tile, rank)
    error = basis.error if basis.error > ZERO else 0.0
    numbers = {"error": error, "amplification": basis.amplification}
    short = {key: float(f"{value:.{DIGITS}g}") for key, value in numbers.items()}
    return {"basis": name, "tile": tile, "rank": rank, **short, "exact": basis.exact}


def measure_all(tiles: list[int]) -> list[dict[str, Any]]:
    """A row for every basis that is registered for these tiles; raises SettingError for a tile that has none."""
    for tile in tiles:
        if not 1 <= tile <= LARGEST or not list_bases(tile):
            raise SettingError(f"--tile {tile} is not drawn; give whole numbers from 1 to {LARGEST} that have bases")
    return [
        measure(name, tile, rank) for tile in tiles for name in list_bases(tile) for rank in available_ranks(name, tile)
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A column a tile: error against rank above, S below; a star is an exact basis."""
    tiles = sorted({row["tile"] for row in rows})
    names = sorted({row["basis"] for row in rows})
    figure, grid = plt.subplots(
        2, len(tiles), figsize=(4.2 * len(tiles), 6.4), sharex="col", squeeze=False, layout="constrained"
    )
    for column, tile in enumerate(tiles):
        error, noise = grid[:, column]
        for index, name in enumerate(names):
            own = [row for row in rows if (row["tile"], row["basis"]) == (tile, name)]
            style: dict[str, Any] = {"color": f"C{index}", "label": name}
            style |= {"linestyle": "--"} if name == YARDSTICK else {"linestyle": "-", "marker": "o", "markersize": 3}
            for axes, key in ((error, "error"), (noise, "amplification")):
                axes.plot([row["rank"] for row in own], [row[key] for row in own], linewidth=1, **style)
                exact = [row for row in own if row["exact"]]
                at = [row["rank"] for row in exact], [row[key] for row in exact]
                axes.plot(*at, "*", color=style["color"], markersize=11, markeredgecolor="black", zorder=3)
        error.set_title(f"t = {tile}")
        noise.set(xlabel="rank r", yscale="log")
        for axes in (error, noise):
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("relative squared error")
    grid[1, 0].set_ylabel("S: amplification of rounding noise")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="white", marker="*", markeredgecolor="black", markersize=11))
    figure.legend(handles, [*labels, "exact"], loc="outside lower center", ncols=len(labels) + 1, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tile", type=int, nargs="+", default=TILES, help="tile sizes")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the files go")
    given = parser.parse_args()
    try:
        rows = measure_all(sorted(set(given.tile)))
        given.out.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(map(json.dumps, rows))
        (given.out / "bases.json").write_text(f"[\n{lines}\n]\n")
        plot(rows, given.out / "bases.png")
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} bases: {given.out / 'bases.json'}   plot: {given.out / 'bases.png'}")


if __name__ == "__main__":
    main()
