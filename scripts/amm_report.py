"""The Markdown and the plot of what bench_amm.py measured."""

from pathlib import Path
from typing import Any

import matplotlib
from tables import origin, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
# Rivals that take any budget, and how they are drawn.
RIVALS = {
    "svd + stl": ("black", "-"),
    "pruned": ("C3", "--"),
    "svd": ("C4", "--"),
    "largest columns": ("C5", ":"),
    "sampled columns": ("C8", ":"),
    "sketched": ("C7", ":"),
}
COLUMNS = ("t, r", "MACs", "best basis", "S", "foreseen", "stl", *RIVALS)
EXACT = 1e-6  # foreseen errors below are of exact bases
NOISY = 6  # inexact bases whose noise is shown


def best_of_each_rank(rows: list[Row]) -> list[Row]:
    """Of the STL rows that cost less than the dense product, the basis with the least error at each tile and rank,
    cheapest first."""
    best: dict[tuple[int, int], Row] = {}
    for row in rows:
        if row["method"] == "stl" and row["mac_fraction"] < 1:
            key = row["tile"], row["rank"]
            if key not in best or row["error_float32"] < best[key]["error_float32"]:
                best[key] = row
    return sorted(best.values(), key=lambda row: (row["macs"], row["error_float32"]))


def compared(rows: list[Row]) -> list[Row]:
    """Of these, the rows that rivals are compared with: what no cheaper STL is foreseen to match."""
    return [row for row in best_of_each_rank(rows) if row["compared"]]


def unbeaten(rows: list[Row]) -> list[Row]:
    """Of rows with ascending MACs, those that no cheaper one beats."""
    kept: list[Row] = []
    for row in rows:
        if not kept or better(row, kept[-1]):
            kept.append(row)
    return kept


def rival(rows: list[Row], method: str, budget: int) -> Row | None:
    return next((row for row in rows if row["method"] == method and row["budget"] == budget), None)


def number(row: Row | None, key: str = "error_float32") -> str:
    """An error and, where it is not negligible, its standard deviation over the pairs."""
    if row is None:
        return "–"
    error, spread = row[key], row[key.replace("error", "std")]
    if error < 1e-3:
        return f"{error:.0e}"
    return f"{error:.3f}" + (f" ± {spread:.3f}" if spread and spread >= 0.0005 else "")


def foreseen(row: Row) -> str:
    return "0" if row["predicted"] < EXACT else f"{row['predicted']:.3f}"


# --- tables ------------------------------------------------------------------------------------------------------


def essential(rows: list[Row]) -> str:
    """A row for every STL product that no cheaper one is foreseen to match, with the rivals at its MACs."""
    cells = []
    for row in compared(rows):
        cells.append(
            [
                f"{row['tile']}, {row['rank']}",
                f"{row['mac_fraction']:.3f}",
                row["basis"],
                f"{row['amplification']:.3g}",
                foreseen(row),
                number(row),
                *(number(rival(rows, method, row["budget"])) for method in RIVALS),
            ]
        )
    return table(COLUMNS, cells)


def in_bfloat16(rows: list[Row]) -> str:
    """The errors of the same products with bfloat16 operands, and those of the dense product and of 2:4."""
    key = "error_bfloat16"
    plain, half = (number(next(row for row in rows if row["method"] == name), key) for name in ("dense", "2:4"))
    cells = []
    for row in compared(rows):
        products = row, *(rival(rows, method, row["budget"]) for method in RIVALS)
        numbers = (number(product, key) for product in products)
        cells.append([f"{row['tile']}, {row['rank']}", f"{row['mac_fraction']:.3f}", *numbers])
    head = f"With bfloat16 operands, where the dense product has error {plain} and 2:4 {half}:"
    return f"{head}\n\n{table(('t, r', 'MACs', 'stl', *RIVALS), cells)}"


def verdict(rows: list[Row]) -> str:
    """Where STL loses, in sentences: against 2:4 at half the MACs, and against every other rival at equal MACs."""
    half = next(row for row in rows if row["method"] == "2:4")
    words = [f"2:4 has error {squared(half)}"]
    if pruned := rival(rows, "pruned", half["macs"]):
        words.append(f"the largest half of the weights {squared(pruned)}")
    if within := unbeaten([row for row in best_of_each_rank(rows) if row["mac_fraction"] <= 0.5]):
        words.append(f"the best STL for at most that {squared(within[-1])}, {named(within[-1])}")
    sentences = [f"At half the MACs {'; '.join(words)}."]
    if halves := [row for row in best_of_each_rank(rows) if 2 * row["rank"] == row["tile"] ** 3]:
        best = min(halves, key=lambda row: row["error_float32"])
        sentences.append(f"With half the MACs left in its core STL has {squared(best)}, {named(best)} in all.")
    points = [(row, {method: rival(rows, method, row["budget"]) for method in RIVALS}) for row in compared(rows)]
    lost: list[str] = []
    won: list[str] = []
    for method in RIVALS:
        pairs = [(row, other) for row, others in points if (other := others[method])]
        count = sum(better(other, row) for row, other in pairs)
        if pairs:
            (lost if count else won).append(f"{method} at {count} of {len(pairs)}" if count else method)
    if lost:
        sentences.append(f"Of the rows above, at equal MACs, STL alone loses to {'; '.join(lost)}.")
    if won:
        sentences.append(f"It loses at none to {', '.join(won)}.")
    both = [(one, two) for _, others in points if (one := others["svd + stl"]) and (two := others["svd"])]
    if both:
        sentences.append(f"svd + stl beats svd at {sum(better(*pair) for pair in both)} of {len(both)}.")
    return " ".join(sentences)


def better(one: Row, other: Row) -> bool:
    return one["error_float32"] < other["error_float32"]


def squared(row: Row) -> str:
    return f"{number(row)} (squared {row['error_float32'] ** 2:.3f})"


def named(row: Row) -> str:
    return f"{row['basis']} t={row['tile']} r={row['rank']} at {row['mac_fraction']:.3f} of the MACs"


def noise(rows: list[Row]) -> str:
    """What low precision adds to the error of the exact bases, and of the inexact ones where it adds most."""
    dense = next(row for row in rows if row["method"] == "dense")
    stl = [row for row in rows if row["method"] == "stl"]
    exact = [row for row in stl if row["predicted"] < EXACT]
    others = [row for row in stl if row not in exact]
    loud = sorted(others, key=lambda row: -row["error_bfloat16"] / row["error_float32"])[:NOISY]
    plain = f"{dense['error_bfloat16']:.5f}"
    cells = [["dense", "", "", "0", number(dense), plain, "1.00"]]
    for row in sorted([*exact, *loud], key=lambda row: row["amplification"]):
        added = max(row["error_bfloat16"] ** 2 - row["error_float32"] ** 2, 0.0) ** 0.5
        cells.append(
            [
                row["basis"],
                f"{row['tile']}, {row['rank']}",
                f"{row['amplification']:.3g}",
                foreseen(row),
                number(row),
                f"{row['error_bfloat16']:.5f}",
                f"{added / dense['error_bfloat16']:.2f}",
            ]
        )
    return table(("basis", "t, r", "S", "foreseen", "float32", "bfloat16", "added by bfloat16, × dense"), cells)


def markdown(result: dict[str, Any], path: Path) -> str:
    """All that is essential of the results in `path`."""
    run = result["run"]
    source = f"[{path.name}]({path.name}) by `scripts/bench_amm.py`, {result['seeds']} pairs of matrices of each kind"
    if run:
        overrides = " ".join(run["overrides"]) or "nothing"
        source += (
            f"; layers of {run['model']} on {run['dataset']}, {run['epochs']} epochs, top-1 {run['top1']:.2f} % "
            f"(`train.py` with {overrides}), inputs of {run['images']} held-out images a pair"
        )
    parts = [
        "# Approximate matrix multiplication",
        "The error is ‖Y − X·W‖/‖X·W‖ (Frobenius, against float64; float32 operands unless said), ± its standard "
        "deviation over the pairs. MACs are a fraction of the dense product's for one product online, W being known "
        "beforehand: encode and decode count, and so does all that a rival does to X. Each row is an STL product that "
        "no cheaper one is foreseen to match, with the rivals at the same MACs. Foreseen is √basis.error; S is "
        "basis.amplification. Pruned weights keep the largest, wherever they are, and count one MAC each, which no "
        "dense hardware grants. svd + stl is STL on what a low rank leaves of W, with the split that does best.",
    ]
    for kind in result["matrices"]:
        parts.append(f"## {kind['name']}: n = {kind['n']}, k = {kind['k']}, m = {kind['m']}")
        parts += [essential(kind["rows"]), verdict(kind["rows"]), in_bfloat16(kind["rows"])]
    first = result["matrices"][0]
    parts.append(f"## Noise in bfloat16: {first['name']}")
    parts.append(f"The exact bases, and of the others the {NOISY} where it adds most to the error.")
    parts += [noise(first["rows"]), f"<sub>{source}; {origin(result['machine'])}.</sub>"]
    return "\n\n".join(parts) + "\n"


# --- plot --------------------------------------------------------------------------------------------------------


def plot(kinds: list[dict[str, Any]], path: Path) -> None:
    """Error against the fraction of the MACs, a panel for each kind of matrices; the best basis of each rank, where no
    cheaper one of its tile beats it."""
    columns = min(4, len(kinds) + 1)
    lines = -(-(len(kinds) + 1) // columns)  # one more, for the legend
    size = (3.6 * columns, 3.1 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, kind in zip(axes.flat, kinds, strict=False):
        own = kind["rows"]
        best = best_of_each_rank(own)
        for index, tile in enumerate(sorted({row["tile"] for row in best})):
            own_tile = unbeaten([row for row in best if row["tile"] == tile])
            draw(panel, own_tile, "o-", color=f"C{index}", label=f"stl, t = {tile}")
        for method, (color, style) in RIVALS.items():
            found = sorted((row for row in own if row["method"] == method), key=lambda row: row["macs"])
            draw(panel, found, style, color=color, label=method)
        draw(panel, [row for row in own if row["method"] == "2:4"], "*", color="C3", label="2:4", markersize=12)
        panel.set_yscale("log")
        panel.set(xlim=(0, 1), ylim=(0.02, 3), title=kind["name"])
        panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel("relative error")
    for panel in axes.flat[len(kinds) :]:
        panel.axis("off")
    for panel in axes.flat[: len(kinds)]:
        panel.set_xlabel("MACs, fraction of dense")
    axes.flat[len(kinds)].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})
    plt.close(figure)


def draw(panel: Any, rows: list[Row], style: str, **looks: Any) -> None:
    fractions, errors = [row["mac_fraction"] for row in rows], [row["error_float32"] for row in rows]
    panel.plot(fractions, errors, style, **{"markersize": 4, "linewidth": 1.3, **looks})
