"""Markdown tables and a plot of what bench_ops.py, _parts.py, _blocks.py, _models.py and _llm.py wrote.

    python scripts/bench_table.py results/ops_h200.json --plot results/speed_h200.png > results/speed_h200.md

Tables have a row a shape and a column a method; the method that all are compared with has its time (of models its
images a second), the others their speed against it and in brackets the most that it could be, by the ceilings that
the same run measured; dense models have in brackets how many times as fast they could be themselves. "wrong" has failed
the check against the reference and was not timed; "refused" was not computed, and its file says why.

Below layers stands what the form that they have allows: encode, GEMMs and decode one after the other, each at those
ceilings, with encoded tiles in memory between them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from command_line import command_line
from tables import origin, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
WHAT = {"mlp": "MLP", "attention": "attention block"}
HAVE_WIDTHS = ("bench_ops.py", "bench_blocks.py")
USUAL_TILE = 4  # of which titles and methods say nothing
SPARSE = "2:4"  # whole models have it in inference only


@dataclass(frozen=True)
class Group:
    """Rows of one table: shapes × methods."""

    title: str
    program: str  # that measured them
    yardstick: str  # name of the method that all are compared with
    rows: dict[tuple[str, str], Row]  # by shape and method

    @property
    def shapes(self) -> list[str]:
        return list(dict.fromkeys(shape for shape, _ in self.rows))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for _, method in self.rows))

    def ratio(self, shape: str, method: str, seconds: str = "seconds") -> float | None:
        """How many times faster than the yardstick, or with "bound_seconds" could be; None where that is not known."""
        row, against = self.rows.get((shape, method), {}), self.rows.get((shape, self.yardstick), {})
        if "seconds" not in row or "seconds" not in against or seconds not in row:
            return None
        return against["seconds"] / row[seconds]


def read(path: Path) -> tuple[dict[str, Any], list[Group]]:
    """What a file says of its machine, and its tables. Exits where no benchmark wrote it."""
    try:
        result = json.loads(path.read_text())
        groups = list(_groups_of_models(result) if "models" in result else _groups(result))
        origin(result["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, OSError) else "is not what a benchmark writes"
        known = "bench_ops.py, bench_parts.py, bench_blocks.py, bench_models.py or bench_llm.py"
        sys.exit(f"error: {path}: {what}; give files of {known}")
    return result["machine"], groups


def _groups(result: dict[str, Any]) -> Iterator[Group]:
    """Of layers, blocks or language models: one for each kind and pass."""
    tables: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    tile = max((row["tile"] for row in result["rows"] if "tile" in row), default=USUAL_TILE)  # one for all of a file
    of_tile = "" if tile == USUAL_TILE else f", t = {tile}"
    for row in result["rows"]:
        if "encoded_bytes" in row and result.get("pass") == "forward" and not result.get("eager"):
            row["passes_seconds"] = passes(row, result["ceilings"])
        if "block" in row:
            inner = "hidden" if "hidden" in row else "heads"
            key = (f"{WHAT[row['block']]}, {row['pass']}: samples, tokens, width, {inner}", "bench_blocks.py")
            shape = ", ".join(str(row[name]) for name in ("samples", "tokens", "width", inner))
        elif "phase" in row:
            key = (f"{row['phase']}: model, sequences × tokens", "bench_llm.py")
            shape = f"{row['model']}, {row['batch']} × {row['tokens'] // row['batch']}"
        else:
            parts = "part" in row
            which = "forward, in parts" if parts else result["pass"] + ", eager" * result.get("eager", False)
            key = (f"linear layer, {which}{of_tile}: n, k, m", "bench_parts.py" if parts else "bench_ops.py")
            shape = ", ".join(str(row[name]) for name in ("n", "k", "m"))
        tables.setdefault(key, {})[shape, _method(row["method"])] = row
    for (title, program), rows in tables.items():
        yield Group(title, program, _yardstick(program, [method for _, method in rows]), rows)


def passes(row: Row, top: dict[str, float]) -> float:
    """The least seconds of encode, GEMMs and decode of a layer one after the other, below these ceilings."""
    n, k, m, rank, encoded = (row[name] for name in ("n", "k", "m", "rank", "encoded_bytes"))
    tile = row.get("tile", USUAL_TILE)  # files from before had no other
    P, K, M = (-(-size // tile) for size in (n, k, m))
    size = encoded / (P * K * rank)  # bytes of a number
    sums, weight = size * rank * P * M, size * rank * K * M
    gemms = (encoded + weight + sums) / top["bytes_per_second"], 2 * P * K * M * rank / top["flops_per_second"]
    return (
        (size * n * k + encoded) / top["bytes_per_second"]
        + max(gemms)
        + (sums + size * n * m) / top["bytes_per_second"]
    )


def _yardstick(program: str, methods: list[str]) -> str:
    """A dense one, merged only where all are. A block or a model is compiled where it is to be fast; one layer leaves
    the compiler nothing to do."""
    compiled = program not in ("bench_ops.py", "bench_parts.py")
    dense = [method for method in methods if method.split(", ")[0] == "dense"]
    return min(dense, key=lambda name: ("merged" in name, ("compiled" in name) != compiled), default="dense")


def _method(name: str) -> str:
    return name.replace(f"stl t={USUAL_TILE}", "stl")


def _groups_of_models(result: dict[str, Any]) -> Iterator[Group]:
    """Of models: one for inference and one for training."""
    for name in ("inference", "training"):
        rows = {}
        for row in result["models"]:
            if row.get("devices", 1) == 1 and (name, row["linear"]) != ("training", SPARSE):
                words = [_method(row["linear"])]
                words += [row["backend"]] if row["linear"] not in ("dense", SPARSE) and "backend" in row else []
                words += [f"{row['fused']} fused"] if row.get("fused") else []
                rates = {"seconds": f"{name}_images_per_second", "bound_seconds": f"{name}_bound_images_per_second"}
                rows[row["model"], ", ".join(words)] = row | {
                    seconds: 1 / row[rate] for seconds, rate in rates.items() if rate in row
                }
        yield Group(f"{name}, images a second: model", "bench_models.py", "dense", rows)


# --- tables ------------------------------------------------------------------------------------------------------


def untimed(row: Row | None) -> str:
    """The cell of a method without a time."""
    if row is None:
        return "not run"
    return "refused" if "refused" in row else "wrong"


def speed(group: Group, shape: str, method: str) -> str:
    """The cell of a method: what it takes if it is the yardstick, else how it compares."""
    row = group.rows.get((shape, method))
    if row is None or "seconds" not in row:
        return untimed(row)
    ratio, bound = group.ratio(shape, method), group.ratio(shape, method, "bound_seconds")
    if method == group.yardstick:
        if group.program != "bench_models.py":
            return f"{row['seconds'] * 1e3:.3g} ms"
        return f"{1 / row['seconds']:,.0f}" + (f" ({bound:.2f})" if bound is not None else "")
    if ratio is None:
        return f"{group.yardstick} {speed(group, shape, group.yardstick)}"  # nothing to compare with
    return f"{ratio:.2f}" if bound is None else f"{ratio:.2f} ({bound:.2f})"


def of_passes(group: Group, shape: str, method: str) -> str:
    """The cell of a method: the most it could be pass by pass, and which part of that it is."""
    row = group.rows.get((shape, method))
    if row is None or "seconds" not in row:
        return untimed(row)
    most = group.ratio(shape, method, "passes_seconds")
    return "–" if most is None else f"{most:.2f} ({row['passes_seconds'] / row['seconds']:.0%})"


def memory(group: Group, shape: str, method: str) -> str:
    """The cell of a method: its peak in MiB, beside how much above the dense peak it is, and of how much it may be."""
    row, dense = group.rows.get((shape, method)), group.rows.get((shape, "dense"), {})
    if row is None or "seconds" not in row:
        return untimed(row)
    if "peak_bytes" not in row:
        return "–"
    cell = f"{row['peak_bytes'] / 2**20:,.0f}"
    if "encoded_bytes" in row and "peak_bytes" in dense:
        excess = (row["peak_bytes"] - dense["peak_bytes"]) / 2**20
        cell += f" ({excess:+,.0f} of {row['encoded_bytes'] / 2**20:,.0f})"
    return cell


def markdown(
    group: Group, cell: Callable[[Group, str, str], str], heading: str, methods: list[str] | None = None
) -> str:
    methods = group.methods if methods is None else methods
    rows = ([shape, *(cell(group, shape, method) for method in methods)] for shape in group.shapes)
    return table([heading, *methods], rows)


def left_dense(group: Group) -> list[str]:
    """What 2:4 leaves dense, a line for all models."""
    said = [(shape, row["left_dense"]) for (shape, _), row in group.rows.items() if row.get("left_dense")]
    models = "; ".join(f"{shape}: {', '.join(names)}" for shape, names in said)
    return [f"2:4 leaves dense what its kernels do not take: {models}."] if said else []


def section(path: Path, facts: dict[str, Any], groups: list[Group]) -> str:
    """All that the README says of one file."""
    parts = []
    for group in groups:
        parts.append(markdown(group, speed, group.title))
        timed = [method for (_, method), row in group.rows.items() if "passes_seconds" in row and "triton" in method]
        if timed:
            parts.append(markdown(group, of_passes, "one pass after the other, at most", list(dict.fromkeys(timed))))
        if ("training" in group.title or "backward" in group.title) and any(
            "peak_bytes" in row for row in group.rows.values()
        ):
            parts.append(markdown(group, memory, "peak MiB (above dense, of what the encodes give)"))
        parts += left_dense(group)
    programs = " and ".join(dict.fromkeys(f"`scripts/{group.program}`" for group in groups))
    more = ", ".join(str(facts[key]) for key in ("dtype", "precision") if facts.get(key))
    source = f"[{path.as_posix()}]({path.name}) by {programs}"  # a table lies beside the file that it is of
    return "\n\n".join([*parts, f"<sub>{source}{f', {more}' if more else ''}; {origin(facts)}.</sub>"])


# --- plot --------------------------------------------------------------------------------------------------------


def width(row: Row) -> float:
    """Features of a block; of a layer, between its input and its output."""
    return row["width"] if "width" in row else (row["k"] * row["m"]) ** 0.5


def curves(group: Group, rank: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(width, ratio) of the fastest STL of this rank at each width, and (width, bound)."""
    best: dict[float, tuple[float, float]] = {}
    for (shape, method), row in group.rows.items():
        ratio, bound = group.ratio(shape, method), group.ratio(shape, method, "bound_seconds")
        if row.get("rank") == rank and ratio is not None and bound is not None:
            best[width(row)] = max(best.get(width(row), (0.0, 0.0)), (ratio, bound))
    at = sorted(best)
    return [(x, best[x][0]) for x in at], [(x, best[x][1]) for x in at]


def plot(groups: list[Group], path: Path) -> None:
    """Ratio against width, a panel a group and a curve a rank with its bound. Exits where nothing has both."""
    panels = []
    for group in groups:
        if group.program not in HAVE_WIDTHS:
            continue
        ranks = sorted({row["rank"] for row in group.rows.values() if row.get("rank")})
        if drawn := {rank: curves(group, rank) for rank in ranks if curves(group, rank)[0]}:
            panels.append((group, drawn))
    if not panels:
        sys.exit("error: --plot needs rows of bench_ops.py or bench_blocks.py that were timed")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (4.2 * columns, 3.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for (group, drawn), panel in zip(panels, axes.flat, strict=False):
        for index, (rank, (ratios, bounds)) in enumerate(drawn.items()):
            panel.plot(*zip(*ratios, strict=True), "o-", color=f"C{index}", label=f"r = {rank}")
            panel.plot(*zip(*bounds, strict=True), "_:", color=f"C{index}")
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_ylim(bottom=0)
        panel.set_title(group.title.partition(":")[0], fontsize=10)
        panel.set(xlabel="width", ylabel=f"× {group.yardstick} (dotted: bound)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="what the benchmarks wrote")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    files = {path: read(path) for path in arguments.files}
    print("\n\n".join(section(path, facts, groups) for path, (facts, groups) in files.items()))
    if arguments.plot:
        plot([group for _, groups in files.values() for group in groups], arguments.plot)


if __name__ == "__main__":
    main()
