"""scripts/bench_ops.py on the CPU: what is measured, and that wrong gradients have no time."""

import json
import sys
from functools import partial

import bench_ops
import benchmarking
import pytest
import torch
from bench_ops import Shape
from sparse_kernels import emulate

TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e9}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmarking, "ROUNDS", 2)
    monkeypatch.setattr(benchmarking, "SECONDS", 0.0)


@pytest.mark.parametrize("backward", [False, True])
def test_every_method_is_right_and_has_a_time(backward):
    shape = Shape(22, 12, 8)
    inputs = bench_ops.operands(shape, "cpu", torch.float32)
    candidates = bench_ops.methods(*inputs, [16, 24, 48], ["torch"], backward)
    rows = bench_ops.measure(vars(shape), candidates, TOP, partial(bench_ops.product_error, bench_ops.product(*inputs)))
    assert [row["method"] for row in rows] == ["dense", *(f"stl r={rank}, torch" for rank in (16, 24, 48))]
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 and row["bound_ratio"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    assert rows[0]["macs"] == 22 * 12 * 8 * (3 if backward else 1)
    tiles = 6 * 3 * 16 * 16 + 6 * 3 * 2 * 16 + 6 * 2 * 16 * 16  # encode, core, decode
    assert rows[1]["macs"] == tiles * (3 if backward else 1)
    assert rows[0]["product_error"] < 1e-5
    assert rows[3]["product_error"] < 1e-5  # rank 48 is exact
    assert rows[1]["product_error"] > 0.3
    assert [row.get("rank") for row in rows] == [None, 16, 24, 48]
    assert rows[1]["encoded_bytes"] == 6 * 3 * 16 * 4


def test_other_tiles():
    inputs = bench_ops.operands(Shape(12, 10, 6), "cpu", torch.float32)
    *_, row = bench_ops.measure({}, bench_ops.methods(*inputs, [7], ["torch"], False, tile=2), TOP)
    assert (row["tile"], row["rank"]) == (2, 7)
    assert row["macs"] == 6 * (7 * 5 * 3 + 4 * 7 * (5 + 3))
    assert row["error"] < 1e-5
    assert row["seconds"] > 0


def test_gradients_are_checked_as_well(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    right = bench_ops.stl_linear

    def wrong(x, weight, *rest, **settings):
        return right(x, Halved.apply(weight) if x.dtype == torch.float32 else weight, *rest, **settings)

    monkeypatch.setattr(bench_ops, "stl_linear", wrong)
    inputs = bench_ops.operands(Shape(8, 8, 8), "cpu", torch.float32)
    for backward in (False, True):
        *_, row = bench_ops.measure({}, bench_ops.methods(*inputs, [16], ["torch"], backward), TOP)
        assert ("seconds" in row) != backward


def test_the_file_and_one_line_for_bad_input(tmp_path, monkeypatch, capsys):
    out = tmp_path / "folder" / "ops.json"
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: TOP)
    words = ["bench_ops.py", "--device=cpu", "--dtype=float32", "--shapes", "8,8,8", "--ranks", "16", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", words)
    bench_ops.main()
    written = json.loads(out.read_text())
    assert [row["method"] for row in written["rows"]] == ["dense", "stl r=16, torch"]
    assert written["machine"]["dtype"] == "float32"
    assert "× dense" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--device=cpu", "--shapes", "8,8"])
    with pytest.raises(SystemExit, match=r"^error: --shapes 8,8 must be n,k,m: three positive numbers$"):
        benchmarking.run_main(bench_ops.main)


@pytest.mark.parametrize("eager", [False, True])
def test_on_a_gpu_it_is_a_graph_that_is_timed_or_the_call(tmp_path, monkeypatch, eager):
    graphs = []
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: TOP)
    monkeypatch.setattr(bench_ops, "measure", lambda facts, methods, *_: graphs.extend(m.graph for m in methods) or [])
    words = ["--device=cpu", "--shapes", "8,8,8", "--ranks", "16", f"--out={tmp_path / 'ops.json'}"]
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", *words, *["--eager"] * eager])
    bench_ops.main()
    assert graphs == [not eager] * 2
    assert json.loads((tmp_path / "ops.json").read_text())["eager"] == eager


def test_a_rank_without_a_basis_ends_it_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(bench_ops, "begin", lambda arguments: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--device=cpu", "--shapes", "8,8,8", "--ranks", "16", "5"])
    with pytest.raises(SystemExit, match=r"^error: .*rank=5;"):
        benchmarking.run_main(bench_ops.main)


def test_the_sparse_kernels_are_held_against_the_pruned_weight(monkeypatch):
    emulate(monkeypatch)
    x, w, bias = bench_ops.operands(Shape(9, 32, 16), "cpu", torch.bfloat16)
    method = bench_ops.sparse(x, w, bias)
    assert (method.macs, method.numbers) == (9 * 32 * 16 // 2, 9 * (32 + 16) + 32 * 16 // 2)
    (row,) = bench_ops.measure({}, [method], TOP)
    assert 0 < row["error"] < 0.01
    assert benchmarking.relative_error(method.run(), [x.float() @ w.float().T + bias]) > 0.1


def test_what_the_sparse_kernels_do_not_take_is_refused():
    inputs = bench_ops.operands(Shape(8, 16, 8), "cpu", torch.bfloat16)
    (row,) = bench_ops.measure({}, [bench_ops.sparse(*inputs)], TOP)
    assert row["method"] == "2:4, cuSPARSELt"
    assert row["refused"].startswith("layer '0' is on cpu: kernels for 2:4 sparsity need a GPU")
    assert "seconds" not in row
