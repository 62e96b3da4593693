"""Plots of a table: accuracy against what it costs."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
from metrics import Metric
from study_results import Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def plot(points: list[tuple[str, Result]], title: str, metric: Metric, path: Path) -> None:
    """The metric, with its standard deviation over seeds, against the multiply-accumulates of the linear layers, and
    against the time where some were measured; a line of panels for each number of epochs."""

    def million(result: Result) -> float:
        return result.any["macs"]["linear"] / metric.units(result.any) / 1e6

    unit = f"{'an' if metric.unit[0] in 'aeiou' else 'a'} {metric.unit}"
    costs: list[tuple[str, Callable[[Result], float | None]]] = [
        (f"linear layers, million multiply-accumulates {unit}", million)
    ]
    if any(result.speed for _, result in points):
        costs.append((metric.time, lambda result: result.time))
    budgets = sorted({result.any["epochs"] for _, result in points})
    size = (8 * len(costs), 5 * len(budgets))
    figure, panels = plt.subplots(len(budgets), len(costs), figsize=size, squeeze=False)
    for line, epochs in zip(panels, budgets, strict=True):
        own = [(section, result) for section, result in points if result.any["epochs"] == epochs]
        for axes, (label, cost) in zip(line, costs, strict=True):
            scatter(axes, [(section, result, cost(result)) for section, result in own], metric)
            axes.set(xlabel=label, ylabel=metric.label, title=f"{title}, {epochs} epoch{'s' * (epochs != 1)}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scatter(axes: Axes, points: list[tuple[str, Result, float | None]], metric: Metric) -> None:
    """One colour a section; the names of the rows that none is better than at the same or a lower cost, joined by a
    line. A point without a cost is left out."""
    known = [(section, result, x, statistics.mean(result.scores)) for section, result, x in points if x is not None]
    for section in dict.fromkeys(name for name, *_ in known):
        mine = [(result, x, y) for name, result, x, y in known if name == section]
        spread = [statistics.stdev(result.scores) if len(result.scores) > 1 else 0.0 for result, *_ in mine]
        axes.errorbar([x for _, x, _ in mine], [y for *_, y in mine], spread, fmt="o", capsize=3, label=section)
    best = front([(x, y, result.row.name) for _, result, x, y in known], metric.higher_is_better)
    axes.plot(
        [x for x, *_ in best], [y for _, y, _ in best], color="grey", linewidth=0.8, drawstyle="steps-post", zorder=0
    )
    middle = statistics.mean(axes.get_xlim())
    for x, y, name in best:
        right = x > middle  # its name then ends at the point, inside of the axes
        offset, side = ((-5, 5), "right") if right else ((5, 5), "left")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, ha=side, fontsize=7)
    axes.legend(loc="lower right" if metric.higher_is_better else "upper right")
    axes.grid(alpha=0.3)


def front(points: Iterable[tuple[float, float, str]], higher_is_better: bool) -> list[tuple[float, float, str]]:
    """The points (cost, score, name) that none is better than at the same or a lower cost, the cheapest first."""
    sign = 1 if higher_is_better else -1
    found: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not found or sign * point[1] > sign * found[-1][1]:
            found.append(point)
    return found
