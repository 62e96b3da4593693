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
    words = ["--run", trained, "--bases", "als", "--images", 5, "--out", out]
    program(*words, "--ranks", 16, 17)
    written = json.loads(out.read_text())
    rows = {row["way"]: row for row in written["rows"]}
    assert set(rows) == set(bench_conversion.WAYS)
    assert all((row["tile"], row["basis"], row["rank"]) == (4, "als", 16) for row in rows.values())
    assert written["images"] == 8  # whole batches
    assert written["held_out"] == 360
    before, after = (rows["calibrated"][key] for key in ("error_uncalibrated", "error"))
    assert 0.01 < after <= before
    said = out.with_suffix(".md").read_text()
    assert "| 4 | als | 16 |" in said
    assert "`python scripts/bench_conversion.py --run RUN --tiles 4 --bases als --ranks 16 17 --images 5" in said
    assert "the same rows choose ridge and number of steps" in said
    assert str(trained) not in said


def test_rows_that_the_file_has_are_not_computed_again(program, trained, tmp_path, monkeypatch):
    calls = []

    def convert_once(model, spec, images, held_out, **way):
        calls.append((*spec, len(way)))
        tile, name, rank = spec
        row = {"tile": tile, "basis": name, "rank": rank, "exact": (tile, rank) == (2, 7), "top1": 50.0}
        return row | {"flop_factor": {"linear": 2.0}}

    monkeypatch.setattr(bench_conversion, "convert_once", convert_once)
    monkeypatch.setattr(bench_conversion, "top1", lambda model, held_out: 90.0)
    out = tmp_path / "conversion.json"
    words = ["--run", trained, "--bases", "als", "--images", 5, "--out", out]
    program(*words, "--ranks", 16)
    written = json.loads(out.read_text())
    last = written["rows"].pop()
    out.write_text(json.dumps(written))
    program(*words, "--ranks", 16)
    assert calls == [(4, "als", 16, options) for options in (0, 1, 2, 2)]
    program(*words, "--tiles", 4, 2, "--ranks", 16, 7)
    assert calls[4:] == [(2, "als", 7, options) for options in (0, 1, 2)]
    again = json.loads(out.read_text())
    assert again["rows"][:3] == [*written["rows"], last]
    assert len(again["commands"]) == 2
    said = out.with_suffix(".md").read_text()
    assert said.index("| 2 | als (exact) | 7 | 0.50 | 50.0 |") < said.index("| 4 | als | 16 |")
    with pytest.raises(
        SystemExit, match=r"is of another machine or version \(images was 8, is 12\); give another file"
    ):
        program(*words, "--images", 9)


def test_an_exact_basis_keeps_what_the_model_knows(trained):
    model, data, _ = dense_run(trained)
    held_out = list(batches_of(data, "val"))
    row = bench_conversion.convert_once(model, (4, "exact48", 48), [held_out[0][0]], held_out)
    assert row["exact"]
    assert row["top1"] == pytest.approx(bench_conversion.top1(model, held_out), abs=0.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "--images 0 must be a positive number"),
        (["--bases", "walsh"], "--bases walsh: choose among als, "),
        (["--tiles", "5", "--bases", "als"], "--bases als: choose among causal, frame, "),
        (["--tiles", "5", "--bases", "frame"], "--tiles 5 has no list of ranks, only 2, 3, 4; give --ranks"),
        (["--bases", "strassen"], "--bases strassen have none of the ranks asked for at --tiles 4; give other --ranks"),
        (["--device", "cuda"], "there is no GPU; --device cpu measures the CPU"),
    ],
)
def test_bad_input_is_one_line(program, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        program("--run", tmp_path, *words)
