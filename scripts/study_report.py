"""A table of runs as Markdown, LaTeX, CSV and a plot."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metrics import Metric
from scipy.stats import ttest_rel
from study import Section, Study
from study_plot import plot
from study_results import Result, read_result, read_speeds
from tables import short_commit, table

PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}  # bf16, dense; NVIDIA's data sheets
# as in summaries
SAME = ["val_loss", "params", "epochs", "wall_seconds", "device", "git_commit", "date"]


def columns_of(metric: Metric) -> list[str]:
    """Of every table, before the metric's speeds."""
    macs = "MMACs" if metric.unit == "image" else f"MMACs a {metric.unit}"
    costs = ["params M", f"linear {macs}", f"total {macs}", "× core / linear / total"]
    return ["row", metric.label, "seeds", "against the baseline", "p", *costs, "epochs"]


def mean_and_deviation(numbers: Sequence[float]) -> str:
    mean = f"{statistics.mean(numbers):.2f}"
    return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


def against(result: Result, baseline: Result | None, metric: Metric) -> tuple[str, str]:
    """The mean difference over the seeds that both have, and the p of the one-sided paired t-test for "better", where
    they may be paired."""
    if baseline is None or result is baseline:
        return "", ""
    seeds = [seed for seed in result.summaries if seed in baseline.summaries]
    if not seeds:
        return "–", "–"
    own, other = ([metric.score(of.summaries[seed]) for seed in seeds] for of in (result, baseline))
    difference = statistics.mean(a - b for a, b in zip(own, other, strict=True))
    better = "greater" if metric.higher_is_better else "less"
    if len(seeds) == 1 or len({round(a - b, 9) for a, b in zip(own, other, strict=True)}) == 1:
        return f"{difference:+.2f}", "–"  # the test wants differences that differ
    if not may_be_paired(result, baseline):
        return f"{difference:+.2f}", "–"
    p = ttest_rel(own, other, alternative=better).pvalue
    return f"{difference:+.2f}", "<.001" if p < 0.001 else f"{p:.3f}"


def may_be_paired(result: Result, baseline: Result) -> bool:
    """Whether runs of one seed began alike. Those that begin with the checkpoint of another run may have had another
    one where they are of another commit."""
    if not result.row.runs[0].start:
        return True
    commits = {summary["git_commit"] for of in (result, baseline) for summary in of.summaries.values()}
    return len(commits) == 1


def speed_cells(result: Result, metric: Metric) -> list[str]:
    """In the order of the metric's speeds. A training step is three times the products of inference."""
    speed = result.speed
    if not speed:
        return ["–"] * len(metric.speeds)
    if "prefill" in speed:
        return [f"{speed[phase]:,.0f}" if phase in speed else "–" for phase in ("prefill", "decode")]
    rate, memory = speed["training_images_per_second"], speed.get("peak_memory_gib")
    peak = PEAK_TFLOPS.get(speed["gpu"])
    flops = 3 * 2 * result.any["macs"]["total"] / metric.units(result.any) * rate
    return [
        f"{rate:.0f}",
        f"{100 * flops / (1e12 * peak):.1f}" if peak else "–",
        f"{memory:.1f}" if memory else "–",
        f"{result.time:.1f}",
    ]


def cells(result: Result, baseline: Result | None, metric: Metric, columns: Sequence[str]) -> list[str]:
    """A line of the table, in the order of `columns_of`, and speeds where `columns` has them."""
    seeds = f"{len(result.summaries)} of {len(result.row.runs)}"
    if result.diverged:
        seeds += f", {result.diverged} diverged"
    if not result.summaries:
        return [result.row.name, "–" if result.diverged else "not run", seeds, *[""] * (len(columns) - 3)]
    facts = result.any
    factor = facts["flop_factor"]
    return [
        result.row.name,
        mean_and_deviation(result.scores),
        seeds,
        *against(result, baseline, metric),
        f"{facts['params'] / 1e6:.2f}",
        *(f"{facts['macs'][kind] / metric.units(facts) / 1e6:.1f}" for kind in ("linear", "total")),
        " / ".join(f"{factor[name]:.2f}" for name in ("core", "linear", "total")),
        str(facts["epochs"]),
        *(speed_cells(result, metric) if columns[-1] in metric.speeds else []),
    ]


def origin(results: list[Result]) -> str:
    """Where the figures of a section come from."""
    summaries = [summary for result in results for summary in result.summaries.values()]
    facts = {
        "data": [s["dataset"] for s in summaries],
        "on": [s["device"] for s in summaries],
        "from": [s["date"][:10] for s in summaries],
        "commit": [short_commit(s["git_commit"]) for s in summaries],
        "torch": [s["versions"]["torch"] for s in summaries],
    }
    return "; ".join(f"{key} {', '.join(sorted(set(values)))}" for key, values in facts.items())


def write_report(study: Study, results: Path) -> list[Path]:
    """Write <table>.md, .tex, .csv and, where there is something to show, .png; returns what was written."""
    results.mkdir(parents=True, exist_ok=True)
    base = results / study.name
    markdown, latex, lines = [f"# {study.title}"], [], []
    points: list[tuple[str, Result]] = []
    speeds = read_speeds(results)
    every = {row.folder: read_result(row, results, speeds) for row in study.rows}
    for section in study.sections:
        rows = [every[row.folder] for row in section.rows]
        baseline = every[section.baseline] if section.baseline else None
        columns = columns_of(study.metric)
        if any(result.summaries and result.speed for result in rows):
            columns += study.metric.speeds
        text = [cells(result, baseline, study.metric, columns) for result in rows]
        markdown += [f"## {section.title}", table(columns, text)]
        if baseline:
            note = f"The baseline is {baseline.row.folder}; p is of a one-sided paired t-test over common seeds"
            started = any(result.row.runs[0].start for result in rows)
            markdown.append(f"{note}{', of one commit, and so of one start' * started}.")
        if any(result.summaries for result in rows):
            markdown.append(f"<sub>{origin(rows)}</sub>")
        latex.append(to_latex(section.title, columns, text))
        lines += [line for result in rows for line in csv_lines(section, result, study.metric)]
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
        plot(points, study.title, study.metric, written[-1])
    return written


def csv_lines(section: Section, result: Result, metric: Metric) -> list[dict[str, Any]]:
    return [
        {"section": section.name, "row": result.row.name, "seed": seed}
        | {key: summary[key] for key in (*metric.keys, *SAME)}
        | {f"{key}_macs": summary["macs"][key] for key in ("linear", "total")}
        | {f"factor_{key}": value for key, value in summary["flop_factor"].items()}
        for seed, summary in result.summaries.items()
    ]


LATEX = {character: rf"\{character}" for character in "%&_#$" + "{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "µ": r"$\mu$",
    "–": "--",
}


def escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def to_latex(title: str, columns: Sequence[str], rows: list[list[str]]) -> str:
    """A table for booktabs."""

    def line(words: Sequence[str]) -> str:
        return " & ".join(map(escape, words)) + r" \\"

    body = [line(columns), r"\midrule", *map(line, rows)]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escape(title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
