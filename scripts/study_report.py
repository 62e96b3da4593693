"""A table of runs as Markdown, LaTeX, CSV and a plot of accuracy against multiply-accumulates."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from scipy.stats import ttest_rel
from study import Row, Section, Study
from tables import table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ["row", "top-1 %", "seeds", "against the baseline", "p", "params M", "linear MMACs"]
COLUMNS += ["× core / linear / total", "epochs"]
SAME = [
    "top1",
    "top5",
    "val_loss",
    "params",
    "epochs",
    "wall_seconds",
    "device",
    "git_commit",
    "date",
]  # as in summaries


@dataclass(frozen=True)
class Result:
    """A row with the summaries of its runs that have ended, by seed."""

    row: Row
    summaries: dict[int, dict[str, Any]]

    @property
    def top1(self) -> list[float]:
        return [summary["top1"] for summary in self.summaries.values()]

    @property
    def any(self) -> dict[str, Any]:
        return next(iter(self.summaries.values()))


def read_result(row: Row, results: Path) -> Result:
    summaries = [run.summary(results) for run in row.runs]
    return Result(row, {summary["seed"]: summary for summary in summaries if summary})


def mean_and_deviation(numbers: Sequence[float]) -> str:
    mean = f"{statistics.mean(numbers):.2f}"
    return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


def against(result: Result, baseline: Result | None) -> tuple[str, str]:
    """The mean difference over the seeds that both have, and the p-value of the one-sided paired t-test for "above"."""
    if baseline is None or result is baseline:
        return "", ""
    seeds = [seed for seed in result.summaries if seed in baseline.summaries]
    if not seeds:
        return "–", "–"
    own, other = ([of.summaries[seed]["top1"] for seed in seeds] for of in (result, baseline))
    difference = statistics.mean(a - b for a, b in zip(own, other, strict=True))
    p = ttest_rel(own, other, alternative="greater").pvalue if len(seeds) > 1 else None
    return f"{difference:+.2f}", "–" if p is None else f"{p:.3f}"


def cells(result: Result, baseline: Result | None) -> list[str]:
    """A line of the table, in the order of COLUMNS."""
    if not result.summaries:
        return [result.row.name, "not run", f"0 of {len(result.row.runs)}", *[""] * (len(COLUMNS) - 3)]
    facts = result.any
    factor = facts["flop_factor"]
    return [
        result.row.name,
        mean_and_deviation(result.top1),
        f"{len(result.summaries)} of {len(result.row.runs)}",
        *against(result, baseline),
        f"{facts['params'] / 1e6:.2f}",
        f"{facts['macs']['linear'] / 1e6:.1f}",
        " / ".join(f"{factor[name]:.2f}" for name in ("core", "linear", "total")),
        str(facts["epochs"]),
    ]


def origin(results: list[Result]) -> str:
    """Where the figures of a section come from."""
    summaries = [summary for result in results for summary in result.summaries.values()]
    facts = {
        "data": [s["dataset"] for s in summaries],
        "on": [s["device"] for s in summaries],
        "from": [s["date"][:10] for s in summaries],
        "commit": [(s["git_commit"] or "unknown")[:12] for s in summaries],
        "torch": [s["versions"]["torch"] for s in summaries],
    }
    return "; ".join(f"{key} {', '.join(sorted(set(values)))}" for key, values in facts.items())


def write_report(study: Study, results: Path) -> list[Path]:
    """Write <table>.md, .tex, .csv and, where there is something to show, .png; returns what was written."""
    results.mkdir(parents=True, exist_ok=True)
    base = results / study.name
    markdown, latex, lines = [f"# {study.title}"], [], []
    points: list[tuple[str, Result]] = []
    every = {row.folder: read_result(row, results) for row in study.rows}
    for section in study.sections:
        rows = [every[row.folder] for row in section.rows]
        baseline = every[section.baseline] if section.baseline else None
        text = [cells(result, baseline) for result in rows]
        markdown += [f"## {section.title}", table(COLUMNS, text)]
        if baseline:
            markdown.append(f"The baseline is {baseline.row.folder}.")
        if any(result.summaries for result in rows):
            markdown.append(f"<sub>{origin(rows)}</sub>")
        latex.append(to_latex(section.title, text))
        lines += [line for result in rows for line in csv_lines(section, result)]
        if section.plot:
            points += [(section.name, result) for result in rows if result.summaries]
    written = [base.with_suffix(suffix) for suffix in (".md", ".tex", ".csv")]
    written[0].write_text("\n\n".join(markdown) + "\n")
    written[1].write_text("\n".join(latex))
    with written[2].open("w", newline="") as file:
        if lines:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    if points:
        written.append(base.with_suffix(".png"))
        plot(points, study.title, written[-1])
    return written


def csv_lines(section: Section, result: Result) -> list[dict[str, Any]]:
    return [
        {"section": section.name, "row": result.row.name, "seed": seed}
        | {key: summary[key] for key in SAME}
        | {f"{key}_macs": summary["macs"][key] for key in ("linear", "total")}
        | {f"factor_{key}": value for key, value in summary["flop_factor"].items()}
        for seed, summary in result.summaries.items()
    ]


def to_latex(title: str, rows: list[list[str]]) -> str:
    """A table for booktabs."""

    def line(words: Sequence[str]) -> str:
        escaped = (word.replace("%", r"\%").replace("×", r"$\times$").replace("±", r"$\pm$") for word in words)
        return " & ".join(word.replace("–", "--") for word in escaped) + r" \\"

    body = [line(COLUMNS), r"\midrule", *map(line, rows)]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{title}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def plot(points: list[tuple[str, Result]], title: str, path: Path) -> None:
    """Top-1 against the multiply-accumulates of the linear layers, with the standard deviation over seeds."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for section in dict.fromkeys(name for name, _ in points):
        mine = [result for name, result in points if name == section]
        x = [result.any["macs"]["linear"] / 1e6 for result in mine]
        y = [statistics.mean(result.top1) for result in mine]
        spread = [statistics.stdev(result.top1) if len(result.top1) > 1 else 0.0 for result in mine]
        axes.errorbar(x, y, spread, fmt="o", capsize=3, label=section)
        for a, b, result in zip(x, y, mine, strict=True):
            axes.annotate(result.row.name, (a, b), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set(xlabel="linear layers, million multiply-accumulates an image", ylabel="top-1 %", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
