"""scripts/bench_parts.py on the CPU: the parts of a layer add up to it, and nothing wrong has a time."""

import json
import sys

import bench_parts
import benchmarking
import pytest
import torch
from bench_ops import Shape, operands

TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e15}  # so that traffic is the bound
PARTS = ["encode", "GEMMs", "decode", "whole"]
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU only")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmarking, "ROUNDS", 1)
    monkeypatch.setattr(benchmarking, "SECONDS", 0.0)
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: TOP)


def rows(backend, tile=4, rank=16):
    inputs = operands(Shape(10, 12, 6), "cpu", torch.float32)  # neither the rows nor the features in whole tiles
    return benchmarking.measure({}, bench_parts.methods(*inputs, [rank], [backend], tile), TOP)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_every_part_is_right_and_has_a_time(backend):
    dense, *parts = rows(backend)
    assert [row["part"] for row in parts] == PARTS
    assert [row["method"] for row in parts] == [f"stl r=16, {backend}, {part}" for part in PARTS]
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 for row in (dense, *parts))
    macs = {row["part"]: row["macs"] for row in parts}
    assert macs["encode"] == 3 * 3 * 16 * 16
    assert macs["GEMMs"] == 3 * 3 * 2 * 16
    assert macs["decode"] == 3 * 2 * 16 * 16
    assert macs["whole"] == sum(macs[part] for part in PARTS[:3])


def test_a_part_costs_what_stands_between_it_and_the_next():
    *_, encode, gemms, decode, whole = rows("torch", tile=2, rank=7)
    before, behind, weight = 7 * 5 * 6, 7 * 5 * 3, 7 * 6 * 3
    top = TOP["bytes_per_second"] / 4  # numbers a second
    assert encode["bound_seconds"] == (10 * 12 + before) / top
    assert gemms["bound_seconds"] == (before + weight + behind) / top
    assert decode["bound_seconds"] == (behind + 10 * 6) / top
    assert whole["bound_seconds"] == (10 * 12 + weight + 10 * 6) / top


def test_a_wrong_part_has_no_time(monkeypatch):
    monkeypatch.setitem(
        bench_parts.DECODE, "torch", lambda *inputs, n: 1.1 * bench_parts.decode_by_reference(*inputs, n)
    )
    timed = {row["part"] for row in rows("torch") if "seconds" in row}
    assert timed == {"encode", "GEMMs", "whole"}


def test_the_file_and_one_line_for_bad_input(tmp_path, monkeypatch, capsys):
    out = tmp_path / "parts.json"
    words = ["bench_parts.py", "--device=cpu", "--dtype=float32", "--shapes", "8,8,8", "--ranks", "16", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", words)
    bench_parts.main()
    assert [row["part"] for row in json.loads(out.read_text())["rows"]] == ["whole", *PARTS]
    assert capsys.readouterr().out.splitlines()[1].endswith("% of it the bound")
    for bad, said in {"--backends=auto": "parts are torch or triton", "--ranks=7": "no tile=4 rank=7"}.items():
        monkeypatch.setattr(sys, "argv", [*words, bad])
        with pytest.raises(SystemExit) as end:
            benchmarking.run_main(bench_parts.main)
        assert said in str(end.value)
