"""scripts/bench_rows.py: which models it measures, and how."""

import json
import sys

import bench_rows
import benchmarking
import pytest

TABLE = """
title: A table
sections:
  rows:
    title: two models, three rows
    seeds: [0]
    rows:
      - {name: dense, overrides: [linear=dense], grid: {optimizer.lr: [1, 2]}}
      - {name: stl, overrides: [+model.depth=1, "model.linear_groups=[backbone]"]}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(TABLE)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> list[dict]:
        options = ["--table=mine.yaml", "--device=cpu", "--compile=none", *words]
        monkeypatch.setattr(sys, "argv", ["bench_rows.py", *options])
        benchmarking.run_main(bench_rows.main)
        return json.loads((tmp_path / "results/mine/speed.json").read_text())["models"]

    return run


def test_each_model_is_measured_once(call, monkeypatch):
    measured = []

    def measure(case, make, how):
        measured.append((case, how))
        model = make()
        return {"training_images_per_second": float(sum(p.numel() for p in model.parameters()))}

    monkeypatch.setattr(bench_rows, "measure", measure)
    dense, stl = call("--set", "num_threads=1", "data.batch_size=7")
    assert [row["linear"] for row in (dense, stl)] == ["rows/dense-lr-1", "rows/stl"]
    assert [(case.batch_size, case.fused, how.image_size) for case, how in measured] == [(7, "mlps", 32)] * 2
    assert dense["training_images_per_second"] > stl["training_images_per_second"]
    call()
    assert len(measured) == 2


def test_a_pattern_that_matches_nothing_is_one_line(call):
    with pytest.raises(SystemExit, match=r"^error: --only none matches no row; there are rows/dense-lr-1"):
        call("--only", "none")
