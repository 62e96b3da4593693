"""What runs are compared by."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Metric:
    """Runs are compared by the first of `keys`, of their summaries. MACs are those of one `unit`. `speeds` are columns
    for what was measured of the rows' models, `time` is what plots set the metric against."""

    keys: tuple[str, ...]
    label: str
    higher_is_better: bool
    unit: str
    speeds: tuple[str, ...]
    time: str

    def score(self, summary: dict[str, Any]) -> float:
        return summary[self.keys[0]]

    def units(self, summary: dict[str, Any]) -> int:
        """How many of `unit` the input holds of which a summary counts the MACs."""
        shape = summary.get("input_shape", [1])
        return prod(shape) if self.unit == "token" else shape[0]


METRICS = {
    "top1": Metric(
        ("top1", "top5"),
        "top-1 %",
        True,
        "image",
        ("training images/s", "MFU %", "training GiB", "inference ms"),
        "inference of a batch, ms",
    ),
    "perplexity": Metric(
        ("perplexity",), "perplexity", False, "token", ("prefill tokens/s", "decode tokens/s"), "prefill of a token, µs"
    ),
}


def metric_of(summaries: Sequence[dict[str, Any]]) -> Metric | None:
    """The one that all these have; None where they have none in common."""
    return next((own for key, own in METRICS.items() if all(key in summary for summary in summaries)), None)
