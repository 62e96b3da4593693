"""scripts/benchmarking.py: that nothing wrong has a time, and what the numbers beside a time are."""

import json
from argparse import Namespace

import benchmarking
import pytest
import torch
from benchmarking import Method, describe, measure, relative_error
from torch import nn

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


def test_a_row_has_all_that_is_known_of_it(monkeypatch):
    seconds = {"dense": 4.0, "dense, compiled": 2.0, "stl": 1.0}
    monkeypatch.setattr(benchmarking, "take_turns", lambda runs, device: {name: seconds[name] for name in runs})
    methods = [method("dense"), method("dense, compiled"), method("stl", macs=1, rank=16)]
    *_, row = measure(
        {"width": 8}, methods, {"bytes_per_second": 96, "flops_per_second": 1}, lambda y: {"sum": y.sum()}
    )
    assert row == {
        **{"width": 8, "method": "stl", "rank": 16, "macs": 1, "error": 0, "sum": 16, "seconds": 1.0},
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
