"""scripts/compare.py reads summaries and nothing else."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts" / "compare.py")
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


def write(folder, **changes):
    run = {
        "dataset": "digits",
        "model": "t2t_vit_tiny",
        "linear": {"type": "stl", "tile": 4, "rank": 16, "basis": "frame"},
        "top1": 98.25,
        "params": 1234567,
        "macs": {"total": 2_000_000, "linear": 1_000_000},
        "flop_factor": {"core": 4.0, "linear": 2.5, "total": 1.75},
        "epochs": 3,
        "seed": 0,
        "overrides": [],
        "wall_seconds": 61.2,
        "date": "2026-01-02T00:00:00+00:00",
        "device": "2-thread CPU",
        "git_commit": "0123456789abcdef",
        "versions": {"torch": "2.11.0"},
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**run, **changes}))


def run_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    compare.main()


def test_one_table_and_one_plot_of_the_newest_run_of_each_setting(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a" / "0", linear={"type": "dense", "tile": None, "rank": None, "basis": None}, top1=97.5)
    write(tmp_path / "a" / "1")
    write(tmp_path / "b", top1=98.75, date="2026-01-03T00:00:00+00:00")
    run_script(monkeypatch, tmp_path, "--out", tmp_path / "out")
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| dense | 97.50 | 1.235 | 1.000 | 2.000 | 4.00 / 2.50 / 1.75 | 61 |" in table
    assert "| stl t=4 r=16 frame | 98.75 |" in table
    assert "98.25" not in table
    assert "2-thread CPU, 2026-01-02, 2026-01-03, commit 0123456789ab; torch 2.11.0" in table
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())) == 2
    assert "98.75" in capsys.readouterr().out


def test_runs_of_other_settings_have_a_row_each_and_are_told_apart(tmp_path, monkeypatch):
    for index, overrides in enumerate((["seed=1"], ["seed=2"], ["linear.row_axis=batch", "seed=1"])):
        write(tmp_path / str(index), overrides=overrides, top1=90 + index)
    write(tmp_path / "other", model="t2t_vit_7", epochs=9)
    run_script(monkeypatch, tmp_path)
    table = (tmp_path / "compare.md").read_text()
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 4
    for row in ("t2t_vit_tiny stl t=4 r=16 frame seed=1 | 90", "frame seed=2 | 91", "| t2t_vit_7 stl t=4 r=16 frame |"):
        assert row in table
    assert "frame linear.row_axis=batch seed=1 | 92" in table
    assert "9, 3 epochs" in table


def test_rivals_are_labelled_by_their_own_settings(tmp_path, monkeypatch):
    nothing = dict.fromkeys(("tile", "rank", "basis"))
    rivals = [
        ({"type": "low_rank", **nothing, "factor": 2.667}, []),
        ({"type": "low_rank", **nothing, "factor": 2.0}, ["linear.factor=2"]),
        ({"type": "dense_mixer", **nothing, "kernel_size": 4, "window": "blocks"}, []),
        ({"type": "dense_mixer", **nothing, "kernel_size": 4, "window": "blocks"}, ["linear.window=blocks", "seed=1"]),
    ]
    for index, (linear, overrides) in enumerate(rivals):
        write(tmp_path / str(index), linear=linear, overrides=["linear=" + linear["type"], *overrides], top1=90 + index)
    run_script(monkeypatch, tmp_path)
    table = (tmp_path / "compare.md").read_text()
    for row in (
        "| low_rank ×2.667 | 90.00",
        "| low_rank ×2 | 91.00",
        "| dense_mixer kernel_size=4 window=blocks | 92.00",
        "| dense_mixer kernel_size=4 window=blocks seed=1 | 93.00",
    ):
        assert row in table


def test_no_runs_is_an_error_of_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: no summary.json below .*; train something first"):
        run_script(monkeypatch, tmp_path)


def test_language_models_are_compared_by_perplexity_and_macs_a_token(tmp_path, monkeypatch):
    write(tmp_path / "a", top1=None, perplexity=12.5, input_shape=[2, 50])
    run = json.loads((tmp_path / "a" / "summary.json").read_text())
    del run["top1"]
    (tmp_path / "a" / "summary.json").write_text(json.dumps(run))
    run_script(monkeypatch, tmp_path)
    table = (tmp_path / "compare.md").read_text()
    assert "| linear layers | perplexity | params M |" in table
    assert "| stl t=4 r=16 frame | 12.50 | 1.235 | 0.010 | 0.020 | 4.00 / 2.50 / 1.75 | 61 |" in table
    write(tmp_path / "b", overrides=["seed=1"])
    with pytest.raises(SystemExit, match=r"^error: runs on images and on text cannot stand in one table"):
        run_script(monkeypatch, tmp_path)
