"""One table and one plot of runs, from their summary.json files alone.

python scripts/compare.py outputs/digits                 # every run below; writes compare.{md,json,png} there
python scripts/compare.py outputs/a outputs/b --out results/mine
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = ("linear layers", "top-1 %", "params M", "linear MMACs", "total MMACs", "× core / linear / total", "s")


def label(run: dict[str, Any]) -> str:
    """ "dense", or the STL setting in short."""
    linear = run["linear"]
    if linear["type"] == "dense":
        return "dense"
    return f"{linear['type']} t={linear['tile']} r={linear['rank']} {linear['basis']}"


def read_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """The summaries below these folders, the newest run of each setting only."""
    newest: dict[tuple, dict[str, Any]] = {}
    for folder in folders:
        for path in folder.rglob("summary.json"):
            run = json.loads(path.read_text())
            key = (run["dataset"], run["model"], label(run), run["seed"], run["epochs"])
            if key not in newest or newest[key]["date"] < run["date"]:
                newest[key] = run
    return sorted(newest.values(), key=lambda run: -run["macs"]["total"])


def cells(run: dict[str, Any]) -> list[str]:
    """One row of the table, in the order of COLUMNS: millions of parameters and MACs an image, × fewer than dense."""
    factor = run["flop_factor"]
    return [
        label(run),
        f"{run['top1']:.2f}",
        *(f"{count / 1e6:.3f}" for count in (run["params"], run["macs"]["linear"], run["macs"]["total"])),
        " / ".join(f"{factor[key]:.2f}" for key in ("core", "linear", "total")),
        f"{run['wall_seconds']:.0f}",
    ]


def heading(runs: list[dict[str, Any]]) -> str:
    """What the runs have in common, machine, date and versions included."""
    run = max(runs, key=lambda run: run["date"])
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        f"{run['model']} on {run['dataset']}, {run['epochs']} epochs, seed {seeds}, {run['device']}, "
        f"{run['date'][:10]}, commit {(run['git_commit'] or 'none')[:12]}; {versions}"
    )


def markdown(runs: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(run))} |" for run in runs]
    return "\n".join([*lines, "", heading(runs) + "."]) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Top-1 against total MACs, a point a run."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for run in runs:
        axes.plot(run["macs"]["total"] / 1e6, run["top1"], "o", markersize=9, label=label(run))
    axes.set_xlim(0, 1.1 * max(run["macs"]["total"] for run in runs) / 1e6)
    axes.set(xlabel="MACs of one image, millions", ylabel="top-1, %")
    axes.set_title(f"{runs[-1]['model']} on {runs[-1]['dataset']}", fontsize=11)
    axes.margins(y=0.3)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs below them")
    parser.add_argument("--out", type=Path, help="where the files go; by default the first folder")
    arguments = parser.parse_args()
    runs = read_runs(arguments.folders)
    if not runs:
        sys.exit(f"error: no summary.json below {arguments.folders[0]}; train something first: python train.py")
    out = arguments.out or arguments.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(markdown(runs))
    (out / "compare.json").write_text(json.dumps(runs, indent=2) + "\n")
    plot(runs, out / "compare.png")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for index, column in enumerate(COLUMNS):
        width = max(len(cells(run)[index]) for run in runs)
        table.add_column(column, justify="right" if index else "left", min_width=width)
    for run in runs:
        table.add_row(*cells(run))
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(heading(runs))
    console.print(f"table: {out / 'compare.md'}   plot: {out / 'compare.png'}", soft_wrap=True)


if __name__ == "__main__":
    main()
