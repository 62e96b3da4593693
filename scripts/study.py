"""The rows of a table: what is trained for it, with which settings and seeds, and how far that is.

A table is a file in configs/table/: sections of rows, each a list of settings as `python train.py` takes them. A row is
trained once for each seed of its section; `grid` makes several rows of one.
"""

import csv
import itertools
import json
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from metrics import METRICS, Metric
from omegaconf import OmegaConf
from yaml import YAMLError

from models.resume import READING
from stl import SettingError

CONFIGS = Path(__file__).parents[1] / "configs"
TABLES = CONFIGS / "table"
SPEED = "speed.json"  # of its models on one machine, beside the table
SUMMARY, DIVERGED = "summary.json", "diverged.json"  # one of them is what a run that has ended left
BEGUN = "overrides.json"  # what a run was begun with
CHECKPOINT = "checkpoints/last.ckpt"  # in the folder of a run
KEPT = (SUMMARY, DIVERGED, "metrics.csv", "config.yaml")  # of a run, beside the table
# Settings that say where and how fast a run is, not what it is.
OF_THE_MACHINE = re.compile(
    rf"[+~]*(data\.({'|'.join(sorted(READING))})|compile|num_threads|logger(\..*)?|"
    r"trainer\.(devices|num_nodes|accelerator|strategy)|callbacks\.(progress_bar|checkpoint)(\..*)?)="
)
# Settings that say what is computed in a step: not how it is learnt, nor with which weights it begins.
OF_THE_MODEL = re.compile(r"[+~]*(experiment|(model|linear)(\.(?!start=).*)?|data(\.(image_size|batch_size))?)=")


@dataclass(frozen=True)
class Run:
    """One training run of a row; with `start`, the folder of another one, it needs the checkpoint of that."""

    folder: str  # <section>/<row>/seed<seed>
    overrides: tuple[str, ...]
    metric: str = "top1"
    start: str | None = None

    def summary(self, root: Path) -> dict[str, Any] | None:
        """Its summary below `root`; None where there is none, or one of other settings."""
        return self._read(root, SUMMARY)

    def diverged(self, root: Path) -> dict[str, Any] | None:
        """Where below `root` its loss was not finite any more; None where it has a summary or has not come to that."""
        return None if self.summary(root) else self._read(root, DIVERGED)

    def has_ended(self, root: Path) -> bool:
        return self.summary(root) is not None or self.diverged(root) is not None

    def is_begun_otherwise(self, root: Path) -> bool:
        """Whether what its folder below `root` holds was begun with other settings than its own."""
        try:
            begun = json.loads((root / self.folder / BEGUN).read_text())
        except (OSError, ValueError):
            return False
        return settings(begun) != settings(self.overrides)

    def _read(self, root: Path, name: str) -> dict[str, Any] | None:
        try:
            facts = json.loads((root / self.folder / name).read_text())
        except (OSError, ValueError):
            return None
        return facts if settings(facts["overrides"]) == settings(self.overrides) else None

    def epochs(self, root: Path) -> int:
        """How many epochs of a run that has not ended are in its curve below `root`."""
        try:
            with (root / self.folder / "metrics.csv").open() as file:
                return len({row["epoch"] for row in csv.DictReader(file) if row.get(self.metric)})
        except OSError:
            return 0


@dataclass(frozen=True)
class Row:
    name: str
    folder: str  # <section>/<row>
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Section:
    """Its rows are compared with `baseline`, and shown in the plot where `plot` is set; a section `by_hand` runs only
    where it is asked for."""

    name: str
    title: str
    rows: tuple[Row, ...]
    baseline: str | None  # <section>/<row>, of this section or another
    by_hand: bool
    plot: bool


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    sections: tuple[Section, ...]
    metric: Metric

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for section in self.sections for row in section.rows)


def settings(overrides: Any) -> list[str]:
    """The overrides that say what a run is, checkpoints of other runs wherever these are."""
    own = (word for word in overrides if not OF_THE_MACHINE.match(word))
    return sorted(re.sub(rf"=.*/((?:[^/]+/){{3}}{CHECKPOINT})$", r"=\1", word) for word in own)


def model_settings(overrides: Any) -> list[str]:
    """Of the settings those that say which model it is: rows that have them in common are equally fast."""
    return [word for word in settings(overrides) if OF_THE_MODEL.match(word)]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_study(name: str) -> Study:
    """The table of this name, or in this file; raises SettingError where there is none, or two rows have one folder."""
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
        raise SettingError(f"--table {name} is unknown; there are {known}, or give a file, table.yaml")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except YAMLError as error:
        raise SettingError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    metric = content.get("metric", "top1")
    if metric not in METRICS:
        raise SettingError(f"{path}: metric {metric} is unknown; choose one of {', '.join(METRICS)}")
    sections = []
    for key, section in content["sections"].items():
        rows = [row for entry in section["rows"] for row in _rows(key, section, entry, metric)]
        folders = [row.folder for row in rows]
        if len(set(folders)) < len(folders):
            raise SettingError(f"{path}: two rows of section {key} have the same name")
        by_hand, plot = section.get("by_hand", False), section.get("plot", False)
        sections.append(Section(key, section["title"], tuple(rows), section.get("baseline"), by_hand, plot))
    study = Study(path.stem, content["title"], tuple(sections), METRICS[metric])
    folders = [row.folder for row in study.rows]
    runs = {run.folder for row in study.rows for run in row.runs}
    if missing := {run.start for row in study.rows for run in row.runs if run.start} - runs:
        raise SettingError(f"{path}: start {min(missing)} is none of the runs {', '.join(sorted(runs))}")
    for section in sections:
        if section.baseline is not None and section.baseline not in folders:
            raise SettingError(f"{path}: baseline {section.baseline} is none of the rows {', '.join(folders)}")
    return study


def _rows(section_name: str, section: dict[str, Any], entry: dict[str, Any], metric: str) -> list[Row]:
    """`{start}` in an override is the checkpoint of the same seed's run of the row that `start` names."""
    grid: dict[str, list[Any]] = entry.get("grid", {})
    rows = []
    for values in itertools.product(*grid.values()):
        chosen = list(zip(grid, values, strict=True))
        name = ", ".join([entry["name"], *(f"{key.rpartition('.')[2]} {value}" for key, value in chosen)])
        overrides = [*section.get("overrides", []), *entry.get("overrides", [])]
        overrides += [f"{key}={value}" for key, value in chosen]
        folder = f"{section_name}/{slug(name)}"
        start = entry.get("start", section.get("start"))
        runs = []
        for seed in section["seeds"]:
            first = f"{start}/seed{seed}" if start else None
            words = [word.replace("{start}", f"{first}/{CHECKPOINT}") for word in (*overrides, f"seed={seed}")]
            runs.append(Run(f"{folder}/seed{seed}", tuple(words), metric, first))
        rows.append(Row(name, folder, tuple(runs)))
    return rows


def chosen(study: Study, patterns: list[str]) -> list[Section]:
    """The sections and of them the rows that match; raises SettingError for a pattern that matches nothing."""
    if not patterns:
        return [section for section in study.sections if not section.by_hand]
    found = []
    for section in study.sections:
        rows = [row for row in section.rows if any(fnmatch(row.folder, pattern) for pattern in patterns)]
        if rows:
            found.append(replace(section, rows=tuple(rows)))
    folders = [row.folder for row in study.rows]
    for pattern in patterns:
        if not any(fnmatch(folder, pattern) for folder in folders):
            raise SettingError(f"--only {pattern} matches no row; there are {', '.join(folders)}")
    return found
