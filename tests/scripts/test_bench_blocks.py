"""scripts/bench_blocks.py on the CPU: which blocks are measured, what they cost, and that nothing wrong has a time."""

import json
import sys

import bench_blocks
import benchmarking
import pytest
import torch
from bench_blocks import Bench, Block
from sparse_kernels import emulate

from stl import STLMLP

TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
MLP = Block("mlp", 2, 5, 8, 12)
ATTENTION = Block("attention", 2, 5, 8, 2)
WIDE = Block("mlp", 2, 8, 16, 32), Block("attention", 2, 8, 16, 2)  # sizes that cuSPARSELt takes
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU only")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
N = 2 * 2  # rows of tiles: 5 tokens make two, in each sample


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmarking, "ROUNDS", 1)
    monkeypatch.setattr(benchmarking, "SECONDS", 0.0)
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: TOP)


def rows(block, which, ranks=(16,), backends=("torch",)):
    bench = Bench(block, which, "cpu", torch.float32)
    return benchmarking.measure({}, bench.methods(list(ranks), list(backends)), TOP)


@pytest.mark.parametrize("which", bench_blocks.PASSES)
@pytest.mark.parametrize("block", [MLP, ATTENTION])
def test_every_method_is_right_and_has_a_time(block, which):
    measured = rows(block, which, ranks=(16, 24))
    assert [row["method"] for row in measured] == ["dense", "stl r=16, torch", "stl r=24, torch"]
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 and row["bound_ratio"] > 0 for row in measured)
    assert [row.get("rank") for row in measured] == [None, 16, 24]


def tile_macs(k: int, m: int) -> int:
    """Of an STL layer of rank 16 in tiles of 4, by the formula: core, encode and decode."""
    return N * 16 * ((k // 4) * (m // 4) + 16 * (k // 4) + 16 * (m // 4))


@pytest.mark.parametrize(("which", "passes"), [("inference", 1), ("training", 3)])
def test_macs_and_bytes(which, passes):
    dense, stl = rows(MLP, which)
    assert dense["macs"] == passes * 2 * 10 * 8 * 12
    assert stl["macs"] == passes * 2 * tile_macs(8, 12)
    assert stl["encoded_bytes"] == 4 * 16 * N * (8 // 4 + 12 // 4)
    weights = 2 * 8 * 12 + 12 + 8
    tensors = 4 if which == "training" else 2  # input, output and their gradients
    fast = Bench(MLP, which, "cpu", torch.float32)
    assert next(fast.methods([16], ["torch"])).numbers == tensors * 2 * 5 * 8 + passes * weights
    products = 2 * 2 * (8 // 2) * 5 * 5 * 2  # samples, heads, features of a head, tokens², two products
    dense, stl = rows(ATTENTION, which)
    assert dense["macs"] == passes * (10 * 8 * 24 + 10 * 8 * 8 + products)
    assert stl["macs"] == passes * (tile_macs(8, 24) + tile_macs(8, 8) + products)


def test_the_kernels_come_with_and_without_fusion():
    bench = Bench(MLP, "inference", "cpu", torch.float32)
    names = [method.name for method in bench.methods([16], ["torch", "triton"])]
    assert names == ["dense", "stl r=16, torch", "stl r=16, triton", "stl r=16, triton, fused"]
    attention = Bench(ATTENTION, "inference", "cpu", torch.float32)
    assert [method.name for method in attention.methods([16], ["triton"])] == names[:1] + names[2:]
    module = bench.build(bench_blocks.partial(bench_blocks.STLLinear, tile=4, rank=16))
    (_, plain, _), (_, fused, facts) = bench_blocks.variants("stl", module, ["triton"])
    assert not isinstance(plain[0], STLMLP)
    assert isinstance(fused[0], STLMLP)
    assert plain[0].fc1.backend == fused[0].backend == fused[0].fc1.backend == "triton"
    assert facts == {"backend": "triton", "fused": True}


@needs_interpreter
@pytest.mark.parametrize("block", [Block("mlp", 1, 4, 4, 4), Block("attention", 1, 4, 4, 1)])
def test_the_kernels_are_right(block):
    measured = rows(block, "inference", backends=("triton",))
    assert len(measured) == 3
    assert all("seconds" in row for row in measured)


@pytest.mark.parametrize("which", bench_blocks.PASSES)
def test_a_backend_that_is_wrong_has_no_time(which, monkeypatch):
    right = bench_blocks.variants

    def wrong(name, module, backends):
        for label, variant, facts in right(name, module, backends):
            with torch.no_grad():
                variant[0].fc2.weight += 0.01
            yield label, variant, facts

    monkeypatch.setattr(bench_blocks, "variants", wrong)
    dense, stl = rows(MLP, which)
    assert "seconds" in dense
    assert "seconds" not in stl


@pytest.mark.parametrize("which", bench_blocks.PASSES)
@pytest.mark.parametrize("name", ["qkv.weight", "qkv.decoder", "proj.encoder", "proj.bias"])
def test_the_residual_does_not_hide_wrong_attention(name, which):
    bench = Bench(Block("attention", 2, 197, 32, 2), which, "cpu", torch.bfloat16)
    linear = bench_blocks.partial(bench_blocks.STLLinear, tile=4, rank=16, basis="frame")
    right, wrong = bench.build(linear), bench.build(linear)
    for module, change in ((right, 0.0), (wrong, 0.1)):
        weight = module.attn.get_parameter(name)
        weight.data += change * (1 if name.endswith("bias") else weight.data)
    error = benchmarking.relative_error(bench.run(wrong, bench.dtype)(), bench.run(right, bench.dtype)())
    assert error > benchmarking.TOLERANCE[torch.bfloat16]


@pytest.fixture
def kernels(monkeypatch):
    """The CPU has kernels for 2:4 in every dtype."""
    monkeypatch.setattr(bench_blocks, "has_sparse_kernels", lambda device, dtype: True)


@pytest.mark.parametrize("block", WIDE)
def test_sparse_kernels_are_measured_in_inference(block, kernels, monkeypatch):
    searched = emulate(monkeypatch)
    dense, sparse, _ = rows(block, "inference")
    assert (sparse["method"], "rank" in sparse) == ("2:4", False)
    assert sparse["error"] < 1e-5
    assert sparse["seconds"] > 0
    linear = dense["macs"] - 2 * 2 * 8 * 8 * 16 * (block.kind == "attention")  # but for the products of attention
    assert sparse["macs"] == dense["macs"] - linear // 2
    assert sparse["bound_seconds"] < dense["bound_seconds"]
    assert len(searched) == 2
    assert [row["method"] for row in rows(block, "training")] == ["dense", "stl r=16, torch"]


@pytest.mark.parametrize("which", bench_blocks.PASSES)
@pytest.mark.parametrize("block", WIDE)
def test_a_compiled_block_gives_the_same(block, which):
    bench = Bench(block, which, "cpu", torch.float32)
    module = bench.build(torch.nn.Linear)
    compiled = torch.compile(module, backend="eager")
    for got, wanted in zip(
        bench.run(module, torch.float32, compiled)(), bench.run(module, torch.float32)(), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_sparse_kernels_that_are_wrong_have_no_time(what, kernels, monkeypatch):
    emulate(monkeypatch)
    right = bench_blocks.compress_for

    def wrong(model, *how):
        right(model, *how)
        last = model[0].fc2
        (last.packed.view(last.dtype) if what == "weight" else last.bias).mul_(1.1)

    monkeypatch.setattr(bench_blocks, "compress_for", wrong)
    dense, sparse, _ = rows(WIDE[0], "inference")
    assert "seconds" in dense
    assert sparse["error"] > 1e-3
    assert not {"seconds", "refused"} & set(sparse)


def test_what_the_sparse_kernels_refuse_says_why_and_the_others_go_on(kernels):
    dense, sparse, stl = rows(MLP, "inference")
    assert sparse["method"] == "2:4"
    assert sparse["refused"].startswith("layer '0.fc1' is on cpu: kernels for 2:4 sparsity need a GPU")
    assert not {"seconds", "error", "ratio"} & set(sparse)
    assert min(dense["seconds"], stl["seconds"]) > 0


def test_what_fails_in_the_sparse_kernels_is_refused(kernels, monkeypatch):
    def fails(*how):
        raise NotImplementedError("only supports a specific set\nof operations\n" + "at " * 1000)

    monkeypatch.setattr(bench_blocks, "compress_for", fails)
    _, sparse, _ = rows(WIDE[0], "inference")
    assert sparse["refused"].startswith("NotImplementedError: only supports a specific set of operations at at")
    assert len(sparse["refused"]) < 400


@pytest.mark.parametrize(
    ("device", "dtype", "there"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_where_there_are_sparse_kernels(device, dtype, there):
    assert bench_blocks.has_sparse_kernels(device, dtype) == there


@needs_gpu
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_sparse_kernels_on_a_gpu(kind):
    block = Block(kind, 4, 64, 128, 256 if kind == "mlp" else 2)
    measured = benchmarking.measure({}, Bench(block, "inference", "cuda", torch.bfloat16).methods([], []), TOP)
    assert [row["method"] for row in measured] == ["dense", "dense, compiled", "2:4", "2:4, compiled"]
    assert all("refused" not in row and row["seconds"] > 0 for row in measured)


@needs_gpu
def test_sizes_that_sparse_kernels_on_a_gpu_refuse():
    bench = Bench(Block("mlp", 4, 64, 128, 200), "inference", "cuda", torch.bfloat16)
    *_, sparse, compiled = benchmarking.measure({}, bench.methods([], []), TOP)
    assert [sparse["method"], compiled["method"]] == ["2:4", "2:4, compiled"]
    assert all("layer '0.fc1' cannot be compressed" in row["refused"] for row in (sparse, compiled))


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench_blocks.py", "--device=cpu", "--dtype=float32", *words])
    benchmarking.run_main(bench_blocks.main)


def test_the_file(tmp_path, monkeypatch, capsys):
    out = tmp_path / "folder" / "blocks.json"
    run(monkeypatch, "--mlp", "2,5,8,12", "--attention", "2,5,8,2", "--backends", "torch", f"--out={out}")
    written = json.loads(out.read_text())
    assert [(row["block"], row["pass"], row["method"]) for row in written["rows"]] == [
        (block, which, method)
        for block in ("mlp", "attention")
        for which in bench_blocks.PASSES
        for method in ("dense", "stl r=16, torch")
    ]
    mlp, *_, attention = written["rows"]
    assert [mlp[key] for key in ("samples", "tokens", "width", "hidden")] == [2, 5, 8, 12]
    assert attention["heads"] == 2
    assert written["ceilings"] == TOP
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert all("× dense" in line for line in printed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mlp", "2,5,8"], "--mlp 2,5,8 must be samples,tokens,width,hidden: four positive numbers"),
        (["--attention", "2,5,8,3"], "--attention 2,5,8,3: width must be a multiple of heads"),
        (["--mlp", "2,5,8,12", "--ranks", "200"], "rank"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"^error: .*{said}[^\n]*$"):
        run(monkeypatch, *words, f"--out={tmp_path / 'file.json'}")
