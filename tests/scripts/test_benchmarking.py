"""scripts/benchmarking.py: that nothing wrong has a time, and what the numbers beside a time are."""

import copy
import json
from argparse import Namespace
from dataclasses import replace

import benchmarking
import pytest
import torch
from benchmarking import Method, compress_for, describe, measure, prune, relative_error, takes, work
from sparse_kernels import emulate
from torch import nn

from models.sparse24 import Sparse24Linear
from stl import STLMLP, SettingError, STLLinear, fuse_mlps

TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
ONES = torch.ones(4, 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmarking, "ROUNDS", 2)
    monkeypatch.setattr(benchmarking, "SECONDS", 0.0)


def method(name, *got, macs=64, numbers=48, **facts) -> Method:
    """It gives these tensors, and should give ones."""
    got = got or (ONES,)
    return Method(name, lambda: got, lambda: (ONES.double(),) * len(got), macs, numbers, facts)


def test_what_is_wrong_has_no_time():
    nan = ONES * float("nan")
    methods = [
        method("dense"),
        method("off", ONES * 1.1),
        method("gradient", ONES, ONES * 1.1),
        method("nan", nan, ONES),
    ]
    right, *wrong = measure({"n": 4}, methods, TOP)
    assert right["ratio"] == 1
    assert [row["method"] for row in wrong] == ["off", "gradient", "nan"]
    for row in wrong:
        assert not {"seconds", "ratio", "bound_ratio"} & set(row)
        assert describe("4", row).endswith("WRONG, not timed")


def test_a_few_rows_that_are_not_computed_have_no_time():
    rows = torch.ones(10_000, 4)
    lost = rows.clone()
    lost[-16:] = 0
    torch.manual_seed(0)
    rounded = (rows * (1 + 0.02 * torch.randn_like(rows))).bfloat16()
    candidates = {"dense": rows.bfloat16(), "lost": lost.bfloat16(), "rounded": rounded}
    methods = [Method(name, lambda got=got: (got,), lambda: (rows,), 1, 1) for name, got in candidates.items()]
    timed = {row["method"]: "seconds" in row for row in measure({}, methods, TOP)}
    assert relative_error([candidates["lost"]], [rows]) < benchmarking.TOLERANCE[torch.bfloat16]
    assert timed == {"dense": True, "lost": False, "rounded": True}


def test_what_is_refused_is_not_computed_and_says_why():
    refused = replace(method("2:4", ONES * 2), refused="sizes of 3", run=None)
    dense, row, stl = measure({"n": 4}, [method("dense"), refused, method("stl")], TOP)
    assert row == {"n": 4, "method": "2:4", "macs": 64, "refused": "sizes of 3"}
    assert describe("4", row).endswith("REFUSED, not timed: sizes of 3")
    assert dense["ratio"] == 1
    assert stl["ratio"] > 0


def test_without_a_right_dense_method_there_is_no_ratio():
    wrong, right = measure({}, [method("dense", ONES * 2), method("stl")], TOP)
    assert "seconds" not in wrong
    assert right["seconds"] > 0
    assert "ratio" not in right
    assert describe("4", right).endswith(" ms")
    assert measure({}, [method("dense", ONES * 2)], TOP)[0]["error"] == 1


def test_a_method_of_another_number_of_tensors_is_a_mistake():
    with pytest.raises(ValueError, match="argument 2 is"):
        relative_error([ONES], [ONES, ONES])


def test_the_bound_is_the_larger_of_bytes_and_flops():
    for macs, numbers, bound in ((1000, 10, 2e-6), (10, 1000, 4e-6)):
        assert measure({}, [method("dense", macs=macs, numbers=numbers)], TOP)[0]["bound_seconds"] == bound


@pytest.mark.parametrize(("training", "passes"), [(False, 1), (True, 3)])
def test_work_counts_the_half_of_a_weight_that_2_4_keeps(training, passes):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    assert work(model, (2, 3, 16), 5, training) == (
        passes * 6 * (16 * 8 + 8 * 4),
        5 + passes * (16 * 8 + 8 + 8 * 4 + 4),
    )
    prune(model, lambda layer: layer.in_features == 16)
    assert work(model, (2, 3, 16), 5, training) == (
        passes * 6 * (16 * 4 + 8 * 4),
        5 + passes * (16 * 4 + 8 + 8 * 4 + 4),
    )


def test_sizes_that_cusparselt_takes():
    sizes = {(147, 192): False, (576, 256): True, (256, 1000): False, (256, 256): True}
    assert {size: takes(nn.Linear(*size, device="meta"), torch.bfloat16) for size in sizes} == sizes


def test_pruning_keeps_the_two_largest_of_four_in_every_dtype():
    dense = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8, bias=False))
    with torch.no_grad():  # so close to each other that bf16 rounds most of them to the same
        for layer in dense:
            layer.weight.copy_(1 + 0.01 * torch.rand_like(layer.weight))
    pruned = copy.deepcopy(dense)
    prune(pruned)
    for before, after in zip(dense, pruned, strict=True):
        assert isinstance(after, Sparse24Linear)
        groups = before.weight.unflatten(1, (-1, 4))
        kept = torch.zeros_like(groups).scatter_(2, groups.topk(2, 2).indices, 1.0).flatten(1)
        torch.testing.assert_close(after.weight, before.weight * kept, rtol=0, atol=0)
        assert (before.bias is None) == (after.bias is None)
        rounded = after.weight.bfloat16()
        assert torch.equal(after.bfloat16().pruned(), rounded)
    assert torch.equal(pruned[0].bias, dense[0].bias.bfloat16())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compressed_layers_take_any_input_by_the_algorithm_that_was_searched(mode, monkeypatch):
    searched = emulate(monkeypatch)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False), nn.Linear(16, 3))
    prune(model, lambda layer: layer.out_features > 3)
    x = torch.randn(2, 16, 5).mT  # 10 rows, for which cuSPARSELt wants 16
    wanted = model(x)

    def run():
        with mode(), torch.autocast("cpu", torch.bfloat16):
            return model(x)

    plain = run()
    compress_for(model, torch.bfloat16, run)
    assert searched == [((32, 16), (16, 16)), ((16, 32), (32, 16))]
    torch.testing.assert_close(run(), plain, rtol=0.02, atol=0.01)
    torch.testing.assert_close(run().float(), wanted, rtol=0.05, atol=0.03)
    assert len(searched) == 2  # once


def test_a_row_has_all_that_is_known_of_it(monkeypatch):
    seconds = {"dense": 4.0, "dense, compiled": 2.0, "stl": 1.0}
    monkeypatch.setattr(benchmarking, "take_turns", lambda runs, device: {name: seconds[name] for name in runs})
    methods = [method("dense"), method("dense, compiled"), method("stl", macs=1, rank=16)]
    *_, row = measure(
        {"width": 8}, methods, {"bytes_per_second": 96, "flops_per_second": 1}, lambda y: {"sum": y.sum()}
    )
    assert row == {
        **{"width": 8, "method": "stl", "rank": 16, "macs": 1, "error": 0, "row_error": 0, "sum": 16, "seconds": 1.0},
        **{"ratio": 4.0, "ratio_compiled": 2.0, "bound_seconds": 2.0, "bound_ratio": 2.0},
    }
    words = describe("8", row | {"peak_bytes": 2**22})
    assert all(word in words for word in ("4.00× dense (bound 2.00×)", "2.00× dense compiled", "peak 4 MiB"))


def test_turns_are_taken_and_the_first_warms_up(monkeypatch):
    turns = []

    def seconds(run, device):
        turns.append(run())
        return {"a": 1.0, "b": 2.0}[turns[-1]] * (100 if len(turns) <= 2 else 1)

    monkeypatch.setattr(benchmarking, "seconds_a_call", seconds)
    assert benchmarking.take_turns({"a": lambda: "a", "b": lambda: "b"}, "cpu") == {"a": 1.0, "b": 2.0}
    assert turns == ["a", "b"] * 3


def test_one_pass_gives_the_output_and_behind_it_the_gradients():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (y,) = benchmarking.one_pass(torch.square, [x], [x], None)()
    assert not y.requires_grad
    y, dx = benchmarking.one_pass(torch.square, [x], [x], torch.tensor([1.0, 10.0]))()
    assert (y.tolist(), dx.tolist()) == ([1, 4], [2, 40])
    other = torch.ones(2, requires_grad=True)
    assert len(benchmarking.one_pass(torch.mul, [x, other], [x], torch.ones(2), [other])()) == 2


def test_all_layers_and_mlps_get_the_backend():
    model = nn.Sequential(nn.Sequential(STLLinear(4, 4), nn.GELU(), STLLinear(4, 4)), STLLinear(4, 4), nn.Linear(4, 4))
    fuse_mlps(model)
    benchmarking.set_backend(model, "torch")
    assert isinstance(model[0], STLMLP)
    assert [layer.backend for layer in (model[0], *model[0].layers, model[1])] == ["torch"] * 4
    assert STLLinear.backend == "auto"


def test_what_is_no_list_of_sizes_is_one_line():
    assert benchmarking.parse_sizes("--shapes", "4,8", "n,k") == [4, 8]
    for text in ("4", "4,8,2", "4,0", "4,x"):
        with pytest.raises(SettingError, match=f"--shapes {text} must be n,k: two positive numbers"):
            benchmarking.parse_sizes("--shapes", text, "n,k")


def test_what_all_rows_share(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: TOP | {"dtype": str(dtype)})
    arguments = Namespace(device="cpu", dtype="float16", out=tmp_path / "folder" / "x.json")
    result = benchmarking.begin(arguments)
    assert (result["ceilings"]["dtype"], result["machine"]["device"], result["rows"]) == ("torch.float16", "cpu", [])
    assert arguments.out.parent.is_dir()
    json.dumps(result)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError, match="there is no GPU; --device cpu measures the CPU"):
        benchmarking.begin(Namespace(device="cuda", dtype="float16", out=arguments.out))


def test_the_machine_is_described():
    facts = benchmarking.machine()
    assert facts["cpu"]
    assert facts["cpu_cores"] >= 1
    assert {"gpu", "driver", "versions", "git_commit", "date"} <= set(facts)


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"machine": 1}'])
def test_a_file_to_go_on_with_is_a_result(tmp_path, text):
    path = tmp_path / "speed.json"
    assert benchmarking.earlier(path, {}, ()) is None
    path.write_text(text)
    with pytest.raises(SettingError, match=r"speed\.json is no result of a benchmark; give another file$"):
        benchmarking.earlier(path, {}, ())
    path.write_text('{"machine": {"gpu": "one"}, "images": 8}')
    assert benchmarking.earlier(path, {"gpu": "one", "images": 9}, ["gpu"])["images"] == 8
    with pytest.raises(SettingError, match=r"of another machine or version \(images was 8, is 9\); give another file$"):
        benchmarking.earlier(path, {"gpu": "one", "images": 9}, ["gpu", "images"])
