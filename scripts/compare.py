"""One table and one plot of runs, from their summary.json files alone.

python scripts/compare.py outputs/digits                 # every run below; writes compare.{md,json,png} there
python scripts/compare.py outputs/a outputs/b --out results/mine
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from command_line import command_line
from metrics import Metric, metric_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table
from tables import short_commit


def columns(metric: Metric) -> list[str]:
    """Of the table; MACs are those of an image, or of a token."""
    return ["linear layers", metric.label, "params M", "linear MMACs", "total MMACs", "× core / linear / total", "s"]


def short(linear: dict[str, Any]) -> str:
    """The linear layers in short: their kind, and the settings that they have."""
    if linear["type"] == "stl":
        return f"stl t={linear['tile']} r={linear['rank']} {linear['basis']}"
    own = {key: value for key, value in linear.items() if key != "type" and value is not None}
    words = [f"×{value:g}" if key == "factor" else f"{key}={value}" for key, value in own.items()]
    return " ".join([linear["type"], *words])


def labels(runs: list[dict[str, Any]]) -> list[str]:
    """A name a run: its linear layers, its model and data where they differ, its overrides where names would repeat."""
    varying = [key for key in ("dataset", "model") if len({run[key] for run in runs}) > 1]
    names = [" ".join([*(run[key] for key in varying), short(run["linear"])]) for run in runs]
    shown = [{"linear", *(f"linear.{key}" for key in run["linear"])} for run in runs]
    rest = [
        [word for word in run["overrides"] if word.split("=")[0] not in keys]
        for run, keys in zip(runs, shown, strict=True)
    ]
    return [
        " ".join([name, *words]) if names.count(name) > 1 else name for name, words in zip(names, rest, strict=True)
    ]


def read_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """The summaries below these folders, most MACs first; of runs of one command, the newest."""
    newest: dict[tuple, dict[str, Any]] = {}
    for folder in folders:
        for path in folder.rglob("summary.json"):
            run = json.loads(path.read_text())
            key = (run["dataset"], run["model"], short(run["linear"]), *run["overrides"])
            if key not in newest or newest[key]["date"] < run["date"]:
                newest[key] = run
    return sorted(newest.values(), key=lambda run: (-run["macs"]["total"], run["overrides"]))


def cells(run: dict[str, Any], label: str, metric: Metric) -> list[str]:
    """One row of the table, in the order of `columns`: millions of parameters and MACs, × fewer than dense."""
    factor, units = run["flop_factor"], metric.units(run)
    return [
        label,
        f"{metric.score(run):.2f}",
        *(f"{n / 1e6:.3f}" for n in (run["params"], run["macs"]["linear"] / units, run["macs"]["total"] / units)),
        " / ".join(f"{factor[key]:.2f}" for key in ("core", "linear", "total")),
        f"{run['wall_seconds']:.0f}",
    ]


def heading(runs: list[dict[str, Any]]) -> str:
    """Where the numbers come from: data, model, machine, date and versions of all the runs."""

    def distinct(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    versions = distinct(f"{name} {number}" for run in runs for name, number in run["versions"].items())
    return (
        f"{distinct(run['model'] for run in runs)} on {distinct(run['dataset'] for run in runs)}, "
        f"{distinct(run['epochs'] for run in runs)} epochs, seed {distinct(run['seed'] for run in runs)}, "
        f"{distinct(run['device'] for run in runs)}, {distinct(sorted(run['date'][:10] for run in runs))}, "
        f"commit {distinct(short_commit(run['git_commit']) for run in runs)}; {versions}"
    )


def rows(runs: list[dict[str, Any]], metric: Metric) -> list[list[str]]:
    return [cells(run, label, metric) for run, label in zip(runs, labels(runs), strict=True)]


def markdown(runs: list[dict[str, Any]], metric: Metric) -> str:
    names = columns(metric)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows(runs, metric)]
    return "\n".join([*lines, "", heading(runs) + "."]) + "\n"


def plot(runs: list[dict[str, Any]], metric: Metric, path: Path) -> None:
    """The metric against total MACs, a point a run."""
    macs = [run["macs"]["total"] / metric.units(run) / 1e6 for run in runs]
    lines = -(-len(runs) // 2)  # of the legend
    figure, axes = plt.subplots(figsize=(6, 3.5 + 0.25 * lines), layout="constrained")
    for run, x, label in zip(runs, macs, labels(runs), strict=True):
        axes.plot(x, metric.score(run), "o", markersize=9, label=label)
    axes.set_xlim(0, 1.1 * max(macs))
    axes.set(xlabel=f"MACs of one {metric.unit}, millions", ylabel=metric.label)
    axes.set_title(heading(runs).split(", ")[0], fontsize=11)
    axes.margins(y=0.3)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs below them")
    parser.add_argument("--out", type=Path, help="where the files go; by default the first folder")
    arguments = parser.parse_args()
    runs = read_runs(arguments.folders)
    if not runs:
        sys.exit(f"error: no summary.json below {arguments.folders[0]}; train something first: python train.py")
    metric = metric_of(runs)
    if metric is None:
        sys.exit("error: runs on images and on text cannot stand in one table; give folders of one kind")
    out = arguments.out or arguments.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(markdown(runs, metric))
    (out / "compare.json").write_text(json.dumps(runs, indent=2) + "\n")
    plot(runs, metric, out / "compare.png")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for index, column in enumerate(columns(metric)):
        width = max(len(row[index]) for row in rows(runs, metric))
        table.add_column(column, justify="right" if index else "left", min_width=width)
    for row in rows(runs, metric):
        table.add_row(*row)
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(heading(runs))
    console.print(f"table: {out / 'compare.md'}   plot: {out / 'compare.png'}", soft_wrap=True)


if __name__ == "__main__":
    main()
