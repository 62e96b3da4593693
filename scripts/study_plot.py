"""Plots of a table: accuracy against what it costs."""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib
from metrics import Metric
from study_results import Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def plot(points: list[tuple[str, Result]], title: str, metric: Metric, path: Path) -> None:
    """The metric, with its standard deviation over seeds, against the multiply-accumulates of the linear layers, and
    against milliseconds where some were measured."""

    def million(result: Result) -> float:
        return result.any["macs"]["linear"] / metric.units(result.any) / 1e6

    costs: list[tuple[str, Callable[[Result], float | None]]] = [
        (f"linear layers, million multiply-accumulates a {metric.unit}", million)
    ]
    if any(result.speed for _, result in points):
        costs.append(("inference of a batch, ms", lambda result: result.milliseconds))
    figure, panels = plt.subplots(1, len(costs), figsize=(8 * len(costs), 5), squeeze=False)
    for axes, (label, cost) in zip(panels[0], costs, strict=True):
        scatter(axes, [(section, result, cost(result)) for section, result in points])
        axes.set(xlabel=label, ylabel=metric.label, title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scatter(axes: Axes, points: list[tuple[str, Result, float | None]]) -> None:
    """One colour a section; a point without a cost is left out."""
    for section in dict.fromkeys(name for name, _, x in points if x is not None):
        mine = [(result, x) for name, result, x in points if name == section and x is not None]
        y = [statistics.mean(result.scores) for result, _ in mine]
        spread = [statistics.stdev(result.scores) if len(result.scores) > 1 else 0.0 for result, _ in mine]
        axes.errorbar([x for _, x in mine], y, spread, fmt="o", capsize=3, label=section)
        for (result, a), b in zip(mine, y, strict=True):
            axes.annotate(result.row.name, (a, b), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.legend()
    axes.grid(alpha=0.3)
