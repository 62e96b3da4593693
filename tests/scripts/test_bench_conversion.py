"""scripts/bench_conversion.py on a run of one step."""

import json
import sys

import bench_conversion
import benchmarking
import pytest
from running import QUICK, run
from trained import batches_of, dense_run

from stl.calibration import layer, sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, "linear=dense", *QUICK)
    return folder


@pytest.fixture
def program(monkeypatch):
    for name, value in (("RIDGES", (1.0,)), ("MAX_STEPS", 1), ("PROBED", 1), ("BASIS_STEPS", 1)):
        monkeypatch.setattr(layer, name, value)
    monkeypatch.setattr(sample, "MAX_TILES", 16)
    monkeypatch.setattr(bench_conversion, "BATCH", 4)

    def run_it(*words):
        monkeypatch.setattr(sys, "argv", ["bench_conversion.py", *map(str, words)])
        benchmarking.run_main(bench_conversion.main)

    return run_it


def test_a_row_for_every_way(program, trained, tmp_path):
    out = tmp_path / "new" / "conversion.json"
    program("--run", trained, "--bases", "als", "--ranks", 16, 17, "--images", 5, "--out", out)
    written = json.loads(out.read_text())
    rows = {row["way"]: row for row in written["rows"]}
    assert set(rows) == set(bench_conversion.WAYS)
    assert all((row["basis"], row["rank"]) == ("als", 16) for row in rows.values())
    assert written["images"] == 8  # whole batches
    assert written["held_out"] == 360
    before, after = (rows["calibrated"][key] for key in ("error_uncalibrated", "error"))
    assert 0.01 < after <= before
    assert "| als | 16 |" in out.with_suffix(".md").read_text()


def test_an_exact_basis_keeps_what_the_model_knows(trained):
    model, data, _ = dense_run(trained)
    held_out = list(batches_of(data, "val"))
    row = bench_conversion.convert_once(model, "exact48", 48, [held_out[0][0]], held_out)
    assert row["exact"]
    assert row["top1"] == pytest.approx(bench_conversion.top1(model, held_out), abs=0.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "--images 0 must be a positive number"),
        (["--bases", "walsh"], "--bases walsh: choose among als, "),
    ],
)
def test_bad_input_is_one_line(program, tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        program("--run", tmp_path, *words)
