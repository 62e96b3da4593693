"""scripts/bench_ops.py on the CPU: what is measured, and that nothing wrong has a time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from running import program

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import bench_ops  # noqa: E402
from bench_ops import Method, Shape  # noqa: E402

TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e9}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_ops, "ROUNDS", 2)
    monkeypatch.setattr(bench_ops, "SECONDS", 0.0)


@pytest.mark.parametrize("backward", [False, True])
def test_every_method_is_right_and_has_a_time(backward):
    shape = Shape(22, 12, 8)
    inputs = bench_ops.operands(shape, "cpu", torch.float32)
    candidates = bench_ops.methods(*inputs, [16, 24, 48], ["torch"], backward)
    rows = bench_ops.measure(shape, candidates, TOP, None if backward else bench_ops.product(*inputs))
    assert [row["method"] for row in rows] == ["dense", *(f"stl r={rank}, torch" for rank in (16, 24, 48))]
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 and row["bound_ratio"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    assert rows[0]["macs"] == 22 * 12 * 8 * (3 if backward else 1)
    tiles = 6 * 3 * 16 * 16 + 6 * 3 * 2 * 16 + 6 * 2 * 16 * 16  # encode, core, decode
    assert rows[1]["macs"] == tiles * (3 if backward else 1)
    if not backward:
        assert rows[0]["product_error"] < 1e-5
        assert rows[3]["product_error"] < 1e-5  # rank 48 is exact
        assert rows[1]["product_error"] > 0.3


def test_what_is_wrong_has_no_time():
    ones = torch.ones(4, 4)
    candidates = [
        Method("dense", lambda: ones, lambda: ones.double(), 64, 48),
        Method("off", lambda: ones * 1.1, lambda: ones.double(), 64, 48),
        Method("nan", lambda: ones * float("nan"), lambda: ones.double(), 64, 48),
    ]
    right, *wrong = bench_ops.measure(Shape(4, 4, 4), candidates, TOP, None)
    assert right["ratio"] == 1
    for row in wrong:
        assert not {"seconds", "ratio"} & set(row)
        assert "WRONG" in bench_ops.describe(row)


def test_the_bound_is_the_larger_of_bytes_and_flops():
    ones = torch.ones(4, 4)
    for macs, numbers, bound in ((1000, 10, 2e-6), (10, 1000, 4e-6)):
        method = Method("dense", lambda: ones, lambda: ones.double(), macs, numbers)
        assert bench_ops.measure(Shape(4, 4, 4), [method], TOP, None)[0]["bound_seconds"] == bound


def test_the_file_and_one_line_for_bad_input(tmp_path, monkeypatch, capsys):
    out = tmp_path / "folder" / "ops.json"
    monkeypatch.setattr(bench_ops, "ceilings", lambda device, dtype: TOP)
    words = ["bench_ops.py", "--device=cpu", "--dtype=float32", "--shapes", "8,8,8", "--ranks", "16", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", words)
    bench_ops.main()
    written = json.loads(out.read_text())
    assert [row["method"] for row in written["rows"]] == ["dense", "stl r=16, auto"]
    assert written["machine"]["dtype"] == "float32"
    assert "× dense" in capsys.readouterr().out
    failed = program("scripts/bench_ops.py", "--device=cpu", "--shapes", "8,8")
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: --shapes 8,8 must be n,k,m: three positive numbers"
