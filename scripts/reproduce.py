"""Run, or resume, what a table still lacks, and build it: Markdown, LaTeX, CSV and a plot from summary.json files.

    python scripts/reproduce.py --table vit --list                  # every row: its state, its cost, its command
    python scripts/reproduce.py --table vit --set data.root=/path/to/tiny-imagenet-200 compile=reduce-overhead
    python scripts/reproduce.py --table vit --only 'tuning/*' --jobs 4 --minutes 30
    python scripts/reproduce.py --table vit --build                 # only the table, from what is there

Runs go to outputs/<table>/<section>/<row>/seed<seed>/. What a table needs of a run that has ended is kept in
results/<table>/, beside the table itself; a run that was stopped, by --minutes, Ctrl-C or SIGTERM, goes on next time. A
row that was not run says so, and one whose loss did not stay finite as well.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from benchmarking import run_main
from command_line import command_line
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from study import BEGUN, KEPT, OF_THE_MACHINE, Run, Section, chosen, read_study
from study_report import write_report

from models.callbacks import write_json
from stl import SettingError

PROGRAM = Path(__file__).parents[1] / "train.py"
HYDRAS = re.compile(r"Set the environment variable HYDRA_FULL_ERROR|\s+full_key: |\s+object_type=")  # behind an error


def keep(run: Run, outputs: Path, results: Path) -> bool:
    """Copy what is kept of a run that has ended; False where it has not."""
    if not run.has_ended(outputs):
        return False
    target = results / run.folder
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        (target / name).unlink(missing_ok=True)
        if (outputs / run.folder / name).exists():
            shutil.copyfile(outputs / run.folder / name, target / name)
    return True


def state(run: Run, outputs: Path, results: Path) -> str:
    summary = run.summary(results)
    if summary is not None:
        return f"done, {run.metric} {summary[run.metric]:.2f}"
    if diverged := run.diverged(results):
        return f"diverged in epoch {diverged['epoch']}"
    if run.is_begun_otherwise(outputs):
        return "not run, others in its folder"
    epochs = run.epochs(outputs)
    return f"stopped after {epochs} epochs" if epochs else "not run"


def cost(runs: Iterable[Run], results: Path) -> str:
    """What a run of this row took, where one has ended."""
    for run in runs:
        if summary := run.summary(results):
            return f"{summary['wall_seconds'] / 60:.0f} min, {summary['device']}"
    return "not known"


def command(run: Run, outputs: Path, machine: list[str]) -> list[str]:
    folder = f"hydra.run.dir={outputs / run.folder}"
    return [str(PROGRAM), *overrides(run, outputs), *machine, "callbacks.progress_bar=null", folder]


def overrides(run: Run, outputs: Path) -> list[str]:
    """Those of the run, with the place of the checkpoint that it begins with."""
    return [word.replace(f"={run.start}/", f"={outputs}/{run.start}/") for word in run.overrides]


def listing(sections: Iterable[Section], outputs: Path, results: Path) -> None:
    """Every run on one line, and under each row how to train it."""
    console = Console()
    for section in sections:
        table = Table("row", "seed", "state", "cost", title=f"{section.name}: {section.title}", title_justify="left")
        for row in section.rows:
            for run in row.runs:
                seed = run.folder.rpartition("seed")[2]
                table.add_row(escape(row.name), seed, state(run, outputs, results), cost(row.runs, results))
        console.print(table)
        for row in section.rows:
            words = shlex.join(overrides(row.runs[0], outputs))
            console.print(f"python train.py {words}", soft_wrap=True, highlight=False, markup=False)


def obstacle(run: Run, starts: dict[str, Run], outputs: Path) -> str | None:
    """Why it cannot be started."""
    if run.is_begun_otherwise(outputs):
        return f"{outputs / run.folder} holds a run of other settings; remove it, or give --outputs another folder"
    if run.start and not starts[run.start].summary(outputs):
        return f"it begins with {run.start}, which has not ended in {outputs}"
    return None


def train_all(
    runs: list[Run],
    starts: dict[str, Run],
    machine: list[str],
    jobs: int,
    minutes: float | None,
    outputs: Path,
    results: Path,
) -> list[Run]:
    """Train them, `jobs` side by side, each after the one of `starts` that it begins with; returns those that failed.

    Of several jobs each has one GPU, and all GPUs have as many. After `minutes` what is under way is stopped.
    """
    waiting, failed, done = list(runs), [], 0
    under_way: dict[Run, subprocess.Popen[bytes]] = {}
    gpus, gpu_of = visible_gpus() if jobs > 1 else [], dict[Run, str]()
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        while waiting or under_way:
            before = {run.folder for run in (*waiting, *under_way)}
            ready = [run for run in waiting if run.start not in before]
            for run in ready[: jobs - len(under_way)]:
                waiting.remove(run)
                if reason := obstacle(run, starts, outputs):
                    failed.append(run)
                    print(f"{run.folder} failed: {reason}", flush=True)
                    continue
                if gpus:
                    taken = [gpu_of[other] for other in under_way]
                    gpu_of[run] = min(gpus, key=taken.count)
                under_way[run] = _start(run, machine, outputs, gpu_of.get(run))
                print(f"started {run.folder}{f' on GPU {gpu_of[run]}' if gpus else ''}", flush=True)
            time.sleep(0.2)
            if deadline is not None and time.monotonic() > deadline:
                print(f"{minutes:g} minutes are over", flush=True)
                break
            for run in [run for run, process in under_way.items() if process.poll() is not None]:
                code = under_way.pop(run).returncode
                if (code == 0 or run.diverged(outputs)) and keep(run, outputs, results):
                    done += 1
                    print(f"{run.folder}: {state(run, outputs, results)} ({done} of {len(runs)})", flush=True)
                else:
                    failed.append(run)
                    print(f"{run.folder} failed: {_last_line(outputs / run.folder)}", flush=True)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    for process in under_way.values():
        process.send_signal(signal.SIGTERM)  # a checkpoint, then the end
    for run, process in under_way.items():
        process.wait()
        print(f"{run.folder}: {state(run, outputs, results)}", flush=True)
    return failed


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def _start(run: Run, machine: list[str], outputs: Path, gpu: str | None) -> subprocess.Popen[bytes]:
    folder = outputs / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BEGUN, run.overrides)
    environment = os.environ if gpu is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    with (folder / "log.txt").open("ab") as log:
        words = [sys.executable, *command(run, outputs, machine)]
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not HYDRAS.match(line)]
    return said[-1] if said else "it wrote nothing"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--table", required=True, help="one of configs/table/, or a file like those")
    parser.add_argument("--list", action="store_true", help="show every row and run nothing")
    parser.add_argument("--build", action="store_true", help="build the table from what is there and run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION/ROW", help="patterns of rows")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of this machine, for every run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, over all GPUs")
    parser.add_argument("--minutes", type=float, help="stop after so many; the next call goes on")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the tables")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise SettingError(f"--jobs {arguments.jobs} must be a positive number")
    for word in arguments.set:
        if not OF_THE_MACHINE.match(word):
            raise SettingError(f"--set {word} says what a run is, not where and how it runs; write it into the table")
    study = read_study(arguments.table)
    outputs, results = arguments.outputs.resolve() / study.name, arguments.results / study.name
    if arguments.list:
        listing(chosen(study, arguments.only) if arguments.only else study.sections, outputs, results)
        return
    failed: list[Run] = []
    if not arguments.build:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        runs = [run for section in chosen(study, arguments.only) for row in section.rows for run in row.runs]
        missing = [run for run in runs if not run.has_ended(results) and not keep(run, outputs, results)]
        starts = {run.folder: run for row in study.rows for run in row.runs}
        failed = train_all(missing, starts, arguments.set, arguments.jobs, arguments.minutes, outputs, results)
    for path in write_report(study, results):
        print(f"written to {path}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; see log.txt in their folders below {outputs}")


if __name__ == "__main__":
    run_main(main)
