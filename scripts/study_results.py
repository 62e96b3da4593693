"""What is known of a table's rows: summaries of runs, and how fast their models are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import SPEED, Row, model_settings


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
    def milliseconds(self) -> float | None:
        """Of inference, a batch."""
        if self.speed is None:
            return None
        seconds = self.speed["batch_size"] / self.speed["inference_images_per_second"]
        return 1000 * seconds


def read_speeds(results: Path) -> list[dict[str, Any]]:
    """What bench_rows.py measured, each with the GPU it was on; not what it found wrong."""
    if not (results / SPEED).exists():
        return []
    content = json.loads((results / SPEED).read_text())
    gpu = content["machine"]["gpu"]
    return [row | {"gpu": gpu} for row in content["models"] if "training_images_per_second" in row]


def read_result(row: Row, results: Path, speeds: Sequence[dict[str, Any]]) -> Result:
    summaries = [run.summary(results) for run in row.runs]
    own = model_settings(row.runs[0].overrides)
    speed = next((speed for speed in speeds if speed["settings"] == own), None)
    diverged = sum(run.diverged(results) is not None for run in row.runs)
    return Result(row, {summary["seed"]: summary for summary in summaries if summary}, diverged, speed)
