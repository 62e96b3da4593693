"""What is known of a table's rows: summaries of runs, and how fast their models are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from study import SPEED, Row, Run, model_settings

from models.language.groups import REPLACED


@dataclass(frozen=True)
class Result:
    """A row with the summaries of its runs that have ended well, by seed."""

    row: Row
    summaries: dict[int, dict[str, Any]]
    diverged: int  # how many of its runs did
    speed: dict[str, Any] | None  # of its model, alone on a GPU

    @property
    def scores(self) -> list[float]:
        """What rows are compared by, one for each run."""
        return [summary[self.row.runs[0].metric] for summary in self.summaries.values()]

    @property
    def any(self) -> dict[str, Any]:
        return next(iter(self.summaries.values()))

    @property
    def time(self) -> float | None:
        """What `Metric.time` says."""
        if self.speed is None:
            return None
        if "prefill" in self.speed:
            return 1e6 / self.speed["prefill"]
        return 1000 * self.speed["batch_size"] / self.speed["inference_images_per_second"]


def read_speeds(results: Path) -> list[dict[str, Any]]:
    """What bench_rows.py measured, or bench_llm.py, each with the GPU it was on; not what they found wrong."""
    if not (results / SPEED).exists():
        return []
    content = json.loads((results / SPEED).read_text())
    gpu = content["machine"]["gpu"]
    if "rows" in content:
        return [speed | {"gpu": gpu} for speed in token_speeds(content["rows"])]
    return [row | {"gpu": gpu} for row in content["models"] if "training_images_per_second" in row]


def token_speeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second in prefill and in decoding of each model, its fastest way of computing."""
    fastest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if rate := row.get("tokens_per_second"):
            tile = row.get("tile", 4 if "rank" in row else None)  # files from before had no other
            of = row["model"], row["linear"], tile, row.get("rank"), row.get("way"), row.get("merged", False)
            speed = fastest.setdefault(of, {"of": of})
            speed[row["phase"]] = max(rate, speed.get(row["phase"], 0.0))
    return [speed for speed in fastest.values() if "prefill" in speed]


def measured(run: Run, summary: dict[str, Any], results: Path) -> tuple[Any, ...] | None:
    """Which of the models of bench_llm.py an ended run's is; None where other groups of its layers are replaced than
    there. Two bases of one rank cost the same."""
    config: Any = OmegaConf.load(results / run.folder / "config.yaml")
    linear, groups = summary["linear"], config["model"].get("linear_groups")
    if linear["type"] != "dense" and groups and set(groups) != set(REPLACED):
        return None
    way = config["linear"].get("row_axis") if linear["type"] == "stl" else None
    merged = config["model"].get("merged", False)
    return summary["model"], linear["type"], linear["tile"], linear["rank"], way, merged


def read_result(row: Row, results: Path, speeds: Sequence[dict[str, Any]]) -> Result:
    summaries = {run: run.summary(results) for run in row.runs}
    own = model_settings(row.runs[0].overrides)
    ended = {summary["seed"]: summary for summary in summaries.values() if summary}
    of_tokens = any("of" in speed for speed in speeds)
    of = next((measured(run, summary, results) for run, summary in summaries.items() if summary and of_tokens), None)
    speed = next(
        (speed for speed in speeds if (speed["of"] == of if "of" in speed else speed["settings"] == own)), None
    )
    diverged = sum(run.diverged(results) is not None for run in row.runs)
    return Result(row, ended, diverged, speed)
