"""scripts/bench_calibration.py on a small layer, and the record of the large one."""

import json
import mmap
import sys
from pathlib import Path

import bench_calibration
import benchmarking
import pytest

from stl.calibration.sample import MAX_TILES

RECORD = Path(__file__).parent.parent.parent / "results" / "calibration_memory.json"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """In this process: another takes seconds to begin."""
    monkeypatch.setattr(bench_calibration, "apart", lambda function, *arguments: function(*arguments))


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench_calibration.py", *map(str, words)])
    benchmarking.run_main(bench_calibration.main)


def test_a_small_layer(monkeypatch, tmp_path):
    out = tmp_path / "new" / "memory.json"
    program(monkeypatch, "--sizes", "32,24", "--rows", 32, 64, "--rank", 16, "--out", out)
    written = json.loads(out.read_text())
    assert (written["in_features"], written["out_features"], written["rank"]) == (32, 24, 16)
    assert [row["rows"] for row in written["rows"]] == [32, 64]
    for row in written["rows"]:
        assert 0 < row["bytes_before"] <= row["bytes_peak"]
        assert row["bytes_added"] == row["bytes_peak"] - row["bytes_before"]
        assert row["layer"]["rows"] == row["rows"]


def test_peak_memory_is_that_of_this_process():
    before = bench_calibration.resident("VmRSS")
    taken = mmap.mmap(-1, 2**26)  # pages of its own, not some that were freed before
    for page in range(0, len(taken), mmap.PAGESIZE):
        taken[page] = 1
    assert bench_calibration.resident("VmRSS") >= before + 2**25
    assert bench_calibration.resident("VmHWM") >= bench_calibration.resident("VmRSS") - 2**20
    del taken


def test_a_layer_of_4096_by_11008_stays_below_8_gb():
    written = json.loads(RECORD.read_text())
    assert (written["in_features"], written["out_features"], written["rank"]) == (4096, 11008, 32)
    assert [row["rows"] for row in written["rows"]] == [4096, MAX_TILES * written["tile"]]
    assert max(row["bytes_added"] for row in written["rows"]) < 8e9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "4096"], "--sizes 4096 must be in,out: two positive numbers"),
        (["--rows", "15"], "--rows 15 must be at least 4 batches of a tile"),
        (["--rank", "17"], "basis='als' has no tile=4 rank=17"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        program(monkeypatch, "--out", tmp_path / "memory.json", *words)
