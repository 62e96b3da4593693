"""Tables of runs: what is run, resumed and kept, and what stands in the table."""

import csv
import json
import shutil
import sys

import pytest
import reproduce
from hydra import compose, initialize_config_dir
from metrics import METRICS
from running import CONFIGS
from study import TABLES, Row, Run, model_settings, read_study
from study_plot import front
from study_report import against, to_latex, write_report
from study_results import Result
from tables import short_commit

from stl import SettingError

# Stands in for train.py: top-1 is 10·lr + seed; a run with `fail` fails; one with `diverge` finds a loss of NaN; one
# with `wait` writes a curve and waits.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["hydra.run.dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.csv").write_text("epoch,top1\\n0,0.5\\n0,\\n1,0.6\\n")
(folder / "config.yaml").write_text("model: {}\\nlinear: {row_axis: tokens}\\n")
(folder / "gpu.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
print("complaint" if "fail" in words else "fine")
if "fail" in words:
    sys.exit(1)
if "wait" in words:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
overrides = sorted(word for word in sys.argv[1:] if not word.startswith("hydra"))
if "diverge" in words:
    (folder / "diverged.json").write_text(json.dumps(dict(overrides=overrides, step=610, epoch=1)))
    sys.exit("error: the loss is nan")
summary = dict(seed=int(words["seed"]), top1=10 * float(words["lr"]) + int(words["seed"]), top5=50.0, val_loss=1.0)
summary |= dict(perplexity=summary["top1"], input_shape=[1, 1000])
summary |= dict(params=4_000_000, epochs=2, wall_seconds=60.0, device="a GPU", git_commit="abc", date="2026-01-02T03")
summary |= dict(overrides=overrides, macs=dict(linear=2_000_000, total=3_000_000), dataset="digits")
linear = dict(type="stl", tile=4, rank=16) if "model.weights" in words else dict(type="dense", tile=None, rank=None)
summary |= dict(model="small", linear=linear)
summary |= dict(flop_factor=dict(core=4.0, linear=2.7, total=2.4), versions=dict(torch="2.11.0"))
(folder / "summary.json").write_text(json.dumps(summary))
"""
TABLE = """
title: A table
sections:
  first:
    title: learning rates
    overrides: [epochs=2]
    seeds: [0, 1]
    baseline: first/dense-lr-1
    plot: true
    rows:
      - {name: dense, grid: {lr: [1, 2]}}
  second:
    title: more
    seeds: [0]
    by_hand: true
    rows:
      - {name: broken, overrides: [lr=1, fail=1]}
      - {name: slow, overrides: [lr=1, wait=1]}
      - {name: unstable, overrides: [lr=1, diverge=1]}
"""

OF_LANGUAGE = """
title: A table
metric: perplexity
sections:
  after:
    title: converted
    seeds: [0, 1]
    start: before/dense
    baseline: before/dense
    rows:
      - {name: stl, overrides: [lr=0.5, "model.weights={start}"]}
  before:
    title: dense
    seeds: [0, 1]
    rows:
      - {name: dense, overrides: [lr=1]}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(options…) runs reproduce.py on TABLE, in tmp_path."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mine.yaml").write_text(TABLE)
    monkeypatch.setattr(reproduce, "PROGRAM", tmp_path / "program.py")
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--table", "mine.yaml", *options])
        reproduce.main()

    return run


@pytest.mark.parametrize(
    ("jobs", "visible", "given"),
    [
        ("4", None, ["0", "0", "1", "1"]),
        ("4", "GPU-a,GPU-b", ["GPU-a", "GPU-a", "GPU-b", "GPU-b"]),
        ("1", None, ["all"] * 4),
    ],
)
def test_jobs_share_all_gpus_evenly(call, tmp_path, monkeypatch, jobs, visible, given):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    call("--only", "first/*", "--jobs", jobs)
    assert sorted(path.read_text() for path in tmp_path.rglob("gpu.txt")) == given


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_the_tables_is_a_configuration(path):
    rows, seen = [], set()  # those with something new; a configuration takes its time
    for row in read_study(path.stem).rows:
        words = row.runs[0].overrides
        experiment = next(word for word in words if word.startswith("experiment"))
        named = {word if "." not in word.partition("=")[0] else word.partition("=")[0] for word in words}
        if not {(experiment, name) for name in named} <= seen:
            rows.append(words)
            seen |= {(experiment, name) for name in named}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for words in rows:
            assert compose("train", overrides=list(words)).trainer.max_epochs > 0


def test_what_is_missing_is_run_once_and_the_table_is_built(call, tmp_path, capsys):
    call("--jobs", "2", "--set", "data.root=elsewhere")
    text = (tmp_path / "results/mine/mine.md").read_text()
    assert "| dense, lr 1 | 10.50 ± 0.71 | 2 of 2 |  |  | 4.00 | 2.0 | 3.0 | 4.00 / 2.70 / 2.40 | 2 |" in text
    assert "| dense, lr 2 | 20.50 ± 0.71 | 2 of 2 | +10.00 | " in text
    assert "| broken | not run | 0 of 1 |" in text
    lines = list(csv.DictReader((tmp_path / "results/mine/mine.csv").open()))
    assert [(line["row"], line["seed"], line["top1"]) for line in lines][:2] == [
        ("dense, lr 1", "0", "10.0"),
        ("dense, lr 1", "1", "11.0"),
    ]
    assert r"10.50 $\pm$ 0.71" in (tmp_path / "results/mine/mine.tex").read_text()
    assert (tmp_path / "results/mine/mine.png").stat().st_size > 1000
    assert "(4 of 4)" in capsys.readouterr().out
    call()
    assert "started" not in capsys.readouterr().out
    call("--list")
    assert "done, top1 11.00" in capsys.readouterr().out


def test_runs_begin_with_the_checkpoints_of_others_of_their_seed(call, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(OF_LANGUAGE)
    call("--jobs", "3")
    out = capsys.readouterr().out
    for seed in (0, 1):
        first, then = (out.index(word) for word in (f"before/dense/seed{seed}: done", f"started after/stl/seed{seed}"))
        assert first < then
        summary = json.loads((tmp_path / f"results/mine/after/stl/seed{seed}/summary.json").read_text())
        place = tmp_path / f"outputs/mine/before/dense/seed{seed}/checkpoints/last.ckpt"
        assert f"model.weights={place}" in summary["overrides"]
    text = (tmp_path / "results/mine/mine.md").read_text()
    assert "| row | perplexity | seeds | against the baseline | p | params M | linear MMACs a token | total" in text
    assert "| stl | 5.50 ± 0.71 | 2 of 2 | -5.00 |" in text
    assert "| 4.00 | 0.0 | 0.0 | 4.00 / 2.70 / 2.40 | 2 |" in text
    call("--outputs", "elsewhere")  # where the checkpoints are makes no other run of it
    assert "started" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "commits", "p"), [(None, "ab", "0.037"), ("dense", "aa", "0.037"), ("dense", "ab", "–")]
)
def test_only_runs_that_began_alike_are_paired(start, commits, p):
    """Differences of 1, 2 and 3 have t = √12, and with two degrees of freedom p = (1 − t/√(2 + t²))/2."""
    results = []
    for commit, scores in zip(commits, ((10, 20, 30), (9, 18, 27)), strict=True):
        row = Row("row", "row", tuple(Run(f"row/seed{seed}", (), "top1", start) for seed in range(3)))
        summaries = {seed: {"top1": score, "git_commit": commit} for seed, score in enumerate(scores)}
        results.append(Result(row, summaries, 0, None))
    assert against(*results, METRICS["top1"]) == ("+2.00", p)


def test_a_run_of_other_settings_does_not_count(call, tmp_path):
    call("--only", "first/dense-lr-1")
    run = read_study("mine.yaml").rows[0].runs[0]
    results = tmp_path / "results/mine"
    assert run.summary(results)["top1"] == 10.0
    assert Run(run.folder, (*run.overrides, "trainer.max_epochs=3")).summary(results) is None
    assert Run(run.folder, (*run.overrides, "data.root=x", "compile=default")).summary(results) is not None
    assert Run(run.folder, (*run.overrides, "callbacks.progress_bar=null")).summary(results) is not None
    assert Run(run.folder, (*run.overrides, "callbacks.ema.decay=0.9")).summary(results) is None


def test_a_failure_is_named_and_the_others_go_on(call, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 runs failed"):
        call("--only", "second/broken", "first/*")
    out = capsys.readouterr().out
    assert "second/broken/seed0 failed: complaint" in out
    assert "(4 of 5)" in out


def test_a_run_that_diverges_is_a_result_and_not_run_again(call, tmp_path, capsys):
    call("--only", "second/unstable")
    assert "second/unstable/seed0: diverged in epoch 1 (1 of 1)" in capsys.readouterr().out
    assert "| unstable | – | 0 of 1, 1 diverged |" in (tmp_path / "results/mine/mine.md").read_text()
    kept = sorted(path.name for path in (tmp_path / "results/mine/second/unstable/seed0").iterdir())
    assert kept == ["config.yaml", "diverged.json", "metrics.csv"]
    call("--only", "second/unstable")
    assert "started" not in capsys.readouterr().out


def test_what_is_stopped_says_how_far_it_is(call, capsys):
    call("--only", "second/slow", "--minutes", "0.03")
    assert "second/slow/seed0: stopped after 2 epochs" in capsys.readouterr().out


def test_without_runs_the_table_says_not_run(call, tmp_path):
    call("--build")
    assert (tmp_path / "results/mine/mine.md").read_text().count("not run") == 5
    assert (tmp_path / "results/mine/mine.csv").read_text() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("baseline: first/dense-lr-1", "baseline: first/other"), "baseline first/other is none of"),
        (
            TABLE.replace("title: A table", "metric: bleu\ntitle: A table"),
            "metric bleu is unknown; choose one of top1, p",
        ),
        (
            OF_LANGUAGE.replace("start: before/dense", "start: before/other"),
            "start before/other/seed0 is none of the runs",
        ),
        (TABLE.replace("lr: [1, 2]", "lr: [1, 1]"), "two rows of section first have the same name"),
    ],
)
def test_a_table_that_is_wrong_is_one_line(call, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SettingError, match=message):
        call("--list")


def test_unknown_names_list_what_there_is(call):
    with pytest.raises(SettingError, match="--jobs 0 must be a positive number"):
        call("--jobs", "0")
    with pytest.raises(SettingError, match="matches no row; there are first/dense-lr-1"):
        call("--only", "nothing")
    with pytest.raises(SettingError, match=r"--table none is unknown; there are .*vit"):
        read_study("none")


def test_a_summary_that_is_damaged_does_not_count(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text("{")
    assert Run("a", ()).summary(tmp_path) is None
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"overrides": []}))
    assert Run("a", ()).summary(tmp_path) == {"overrides": []}


def test_a_report_of_no_runs_has_no_plot(tmp_path):
    study = read_study(str(TABLES / "vit.yaml"))
    assert {path.suffix for path in write_report(study, tmp_path)} == {".md", ".tex", ".csv"}


def test_what_a_model_measured_alone_stands_beside_its_runs(call, tmp_path):
    call("--only", "first/*")
    speed = {"batch_size": 100, "inference_images_per_second": 1e4, "training_images_per_second": 1e3}
    rows = [{**speed, "settings": [], "peak_memory_gib": 1.5}, {**speed, "settings": ["model=other"]}]
    content = {"machine": {"gpu": "NVIDIA H200"}, "models": rows}
    (tmp_path / "results/mine/speed.json").write_text(json.dumps(content))
    call("--build")
    text = (tmp_path / "results/mine/mine.md").read_text()
    assert text.count("| training images/s | MFU % | training GiB | inference ms |") == 1  # not where nothing was run
    mfu = 100 * 3 * 2 * 3_000_000 * 1e3 / 989.4e12
    assert f"| 2 | 1000 | {mfu:.1f} | 1.5 | 10.0 |" in text
    rows[0] = {"settings": [], "batch_size": 100}  # wrong, not timed
    (tmp_path / "results/mine/speed.json").write_text(json.dumps(content))
    call("--build")
    assert "inference ms" not in (tmp_path / "results/mine/mine.md").read_text()


def test_tokens_a_second_are_those_of_the_fastest_way(call, tmp_path):
    (tmp_path / "mine.yaml").write_text(OF_LANGUAGE)
    call()
    stl = {"model": "small", "linear": "stl", "rank": 16, "way": "tokens"}
    rows = [
        {**stl, "phase": "prefill", "tokens_per_second": 2000.0},
        {**stl, "phase": "prefill", "tokens_per_second": 3000.0},
        {**stl, "phase": "decode", "tokens_per_second": 10.0},
        {**stl, "phase": "decode", "tokens_per_second": None},  # wrong, not timed
        {**stl, "phase": "prefill", "way": "batch", "tokens_per_second": 9000.0},
        {**stl, "phase": "prefill", "tile": 2, "tokens_per_second": 9000.0},
        {**stl, "phase": "prefill", "merged": True, "tokens_per_second": 8000.0},
        {"model": "small", "linear": "dense", "phase": "prefill", "tokens_per_second": 1000.0},
    ]
    (tmp_path / "results/mine/speed.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H200"}, "rows": rows}))
    call("--build")
    text = (tmp_path / "results/mine/mine.md").read_text()
    assert text.count("| epochs | prefill tokens/s | decode tokens/s |") == 2
    assert "| 2 | 3,000 | 10 |" in text
    assert "| 2 | 1,000 | – |" in text
    for config in (tmp_path / "results/mine/after").rglob("config.yaml"):
        config.write_text("model: {linear_groups: [mlp]}\nlinear: {row_axis: tokens}\n")
    call("--build")
    assert "3,000" not in (tmp_path / "results/mine/mine.md").read_text()  # of all layers


def test_rows_that_only_learn_differently_are_one_model():
    rows = {row.folder: row for row in read_study("vit").rows}

    def of(folder):
        return model_settings(rows[folder].runs[0].overrides)

    assert of("tuning/dense-lr-0.001") == of("tuning/dense-lr-0.002") == ["experiment=tiny_imagenet/t2t_vit_7_dense"]
    assert of("second_ladder/encoded-start-dense") == of("second_ladder/start") != of("tuning/stl-r-16-lr-mult-4")
    assert of("second_ladder/stl-rank-24") != of("second_ladder/stl-rank-32")


def test_what_is_of_the_model():
    words = ["experiment=a", "linear=stl", "+model.embed_dim=144", "model.token_order=block", "data.batch_size=7"]
    assert model_settings([*words, "linear.start=dense", "data.margin=4", "optimizer.lr=1", "seed=0"]) == sorted(words)


def test_a_run_of_other_settings_is_not_gone_on_with(call, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("--only", "second/broken")
    (tmp_path / "mine.yaml").write_text(TABLE.replace("overrides: [lr=1, fail=1]", "overrides: [lr=2]"))
    call("--list", "--only", "second/broken")
    assert "others in its folder" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        call("--only", "second/broken")
    said = capsys.readouterr().out
    assert "second/broken/seed0 failed: " in said
    assert "holds a run of other settings; remove it" in said
    shutil.rmtree(tmp_path / "outputs/mine/second/broken")
    call("--only", "second/broken")
    assert "second/broken/seed0: done, top1 20.00" in capsys.readouterr().out


def test_what_it_begins_with_must_have_ended(call, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(OF_LANGUAGE)
    with pytest.raises(SystemExit):
        call("--only", "after/*")
    assert "after/stl/seed0 failed: it begins with before/dense/seed0, which has not ended" in capsys.readouterr().out
    call("--only", "before/*")
    call("--only", "after/*")
    assert "after/stl/seed1: done" in capsys.readouterr().out


def test_what_a_run_is_does_not_depend_on_the_call(call):
    with pytest.raises(SettingError, match=r"--set trainer.max_epochs=3 says what a run is"):
        call("--set", "data.root=x", "data.max_unreadable=3", "trainer.strategy=ddp", "trainer.max_epochs=3")


def test_a_row_overrides_its_section(tmp_path):
    table = TABLE.replace("overrides: [lr=1, fail=1]", "overrides: [epochs=7]")
    table = table.replace("title: more", "title: more\n    overrides: [epochs=2]")
    (tmp_path / "mine.yaml").write_text(table)
    row = next(row for row in read_study(str(tmp_path / "mine.yaml")).rows if row.name == "broken")
    assert row.runs[0].overrides == ("epochs=2", "epochs=7", "seed=0")


def test_a_file_that_is_no_table_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: [")
    with pytest.raises(SettingError, match=r"mine.yaml cannot be read: while parsing"):
        read_study(str(tmp_path / "mine.yaml"))


def test_of_hydra_the_error_is_shown_and_not_what_stands_behind_it(tmp_path):
    said = "Key 'lrr' is not in struct\n    full_key: optimizer.lrr\n    object_type=dict\n\n"
    (tmp_path / "log.txt").write_text(f"{said}Set the environment variable HYDRA_FULL_ERROR=1 for a stack trace.\n")
    assert reproduce._last_line(tmp_path) == "Key 'lrr' is not in struct"


def test_latex_of_any_name():
    text = to_latex("50 % & more", ["row", "p"], [["lr_mult 2", "<.001"], ["a {b} #1 $x", "1.0 ± 0.1"]])
    assert r"\caption{50 \% \& more}" in text
    assert r"lr\_mult 2 & $<$.001 \\" in text
    assert r"a \{b\} \#1 \$x & 1.0 $\pm$ 0.1 \\" in text


def test_differences_that_do_not_differ_have_no_p(call, tmp_path):
    call("--only", "first/*")
    assert "| +10.00 | – |" in (tmp_path / "results/mine/mine.md").read_text()


def test_changes_to_a_commit_are_not_hidden():
    assert short_commit("0123456789abcdef0123+changes") == "0123456789ab and changes"
    assert short_commit("0123456789abcdef0123") == "0123456789ab"
    assert short_commit(None) == "unknown"


def test_the_front_has_what_none_is_better_than():
    points = [
        (3.0, 30.0, "dear"),
        (1.0, 20.0, "cheap"),
        (2.0, 19.0, "beaten"),
        (3.0, 29.0, "beside"),
        (1.0, 18.0, "low"),
    ]
    assert [name for *_, name in front(points, True)] == ["cheap", "dear"]
    assert [name for *_, name in front([(x, -y, name) for x, y, name in points], False)] == ["cheap", "dear"]
