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
        scatter(axes, [(section, result, cost(result)) for section, result in points], metric)
        axes.set(xlabel=label, ylabel=metric.label, title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scatter(axes: Axes, points: list[tuple[str, Result, float | None]], metric: Metric) -> None:
    """One colour a section, with the name of its best row at each cost; a point without a cost is left out."""
    costs = [x for *_, x in points if x is not None]
    middle = (min(costs) + max(costs)) / 2 if costs else 0.0
    for section in dict.fromkeys(name for name, _, x in points if x is not None):
        mine = [(result, x) for name, result, x in points if name == section and x is not None]
        y = [statistics.mean(result.scores) for result, _ in mine]
        spread = [statistics.stdev(result.scores) if len(result.scores) > 1 else 0.0 for result, _ in mine]
        axes.errorbar([x for _, x in mine], y, spread, fmt="o", capsize=3, label=section)
        best: dict[float, tuple[float, str]] = {}
        for (result, x), score in zip(mine, y, strict=True):
            if x not in best or (score > best[x][0]) == metric.higher_is_better:
                best[x] = score, result.row.name
        for x, (score, name) in best.items():
            right = x > middle  # its name then ends at the point, inside of the axes
            offset, side = ((-5, 4), "right") if right else ((5, 4), "left")
            axes.annotate(name, (x, score), textcoords="offset points", xytext=offset, ha=side, fontsize=7)
    axes.legend()
    axes.grid(alpha=0.3)
