"""scripts/throughput.py on the CPU: that it runs, alone and in several processes, and which rows it measures."""

import json
import sys

import pytest
import throughput
import torch
from benchmarking import run_main
from sparse_kernels import emulate
from throughput import Case, How
from torch import nn

from stl import SettingError, count_flops

QUICK = How(repeats=2, calls=1, image_size=32, compile_mode=None, device="cpu")
HERE = {"gpu": "X", "driver": "1", "versions": {"torch": "2"}, "git_commit": "abc", "compile": None, "date": "today"}
SINGLE = Case("t2t_vit_tiny", "dense", 2)
SPARSE = Case("t2t_vit_tiny", "2:4", 2)
TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
DDP = Case("t2t_vit_tiny", "dense", 2, devices=2, strategy="ddp")


def made(case):
    return throughput.build(case, throughput.linears([16])[case.linear], QUICK)


@pytest.mark.parametrize("linear", ["dense", "stl t=4 r=16"])
def test_one_device(linear, tmp_path):
    case = Case("t2t_vit_tiny", linear, 2)
    throughput._process(0, case, made(case), QUICK, tmp_path)
    rates = json.loads((tmp_path / "rates.json").read_text())
    errors = {f"{plain}{name}" for plain in ("", "plain_") for name in ("error", "gradient_error")}
    assert set(rates) == {"inference_images_per_second", "training_images_per_second"} | errors
    assert min(rates.values()) > 0
    assert max(rates[name] for name in errors) < 0.05


def test_a_fused_model_computes_the_same():
    case = Case("t2t_vit_tiny", "stl t=4 r=16", 2, backend="torch", fused="blocks")
    rates = throughput._rates(case, made(case), QUICK, torch.device("cpu"))
    assert rates["error"] == rates["plain_error"]
    assert rates["gradient_error"] == pytest.approx(rates["plain_gradient_error"])


def test_what_is_wrong_has_no_rate(monkeypatch):
    def disturbed(model, case):
        model.blocks[0].mlp.fc1.bias.data += 1

    monkeypatch.setattr(throughput, "arrange", disturbed)
    rates = throughput._rates(SINGLE, made(SINGLE), QUICK, torch.device("cpu"))
    assert set(rates) == {"error", "plain_error", "gradient_error", "plain_gradient_error"}
    assert rates["error"] > 0.05
    assert throughput.describe({**vars(SINGLE), **rates}).endswith("WRONG, not timed")


def test_2_4_is_measured_in_inference_under_autocast(monkeypatch):
    searched = emulate(monkeypatch)
    rates = throughput._rates(SPARSE, made(SPARSE), QUICK, torch.device("cpu"))
    assert set(rates) == {"left_dense", "error", "plain_error", "inference_images_per_second"}
    assert rates["left_dense"] == ["tokens_to_token.attention1.kqv", "head"]  # 147 features in, 1000 out
    assert 0 < rates["error"] <= throughput.ALLOWED * rates["plain_error"] < 0.05
    assert len(searched) == 8 + 3 * 4  # the T2T module's but for one, and four a block
    line = throughput.describe({**vars(SPARSE), **rates})
    assert "WRONG" not in line
    assert "gradient" not in line


def test_2_4_is_held_against_the_masked_model(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(throughput, "pruned", lambda make: make())  # dense, and compressed all the same
    right = throughput.compress_for

    def pruned_late(model, dtype, run):
        throughput.prune(model, lambda layer: throughput.takes(layer, dtype))
        right(model, dtype, run)

    monkeypatch.setattr(throughput, "compress_for", pruned_late)
    rates = throughput._rates(SPARSE, made(SPARSE), QUICK, torch.device("cpu"))
    assert "inference_images_per_second" not in rates
    assert throughput.describe({**vars(SPARSE), **rates}).endswith("WRONG, not timed")


def test_2_4_that_is_refused_says_why():
    rates = throughput._rates(SPARSE, made(SPARSE), QUICK, torch.device("cpu"))
    assert set(rates) == {"refused"}
    line = throughput.describe({**vars(SPARSE), **rates})
    assert "REFUSED, not timed: layer 'tokens_to_token.attention1.proj' is on cpu: kernels for 2:4" in line


def test_what_else_fails_is_not_refused(monkeypatch):
    def fails(model, case):
        raise RuntimeError("a kernel")

    monkeypatch.setattr(throughput, "arrange", fails)
    with pytest.raises(RuntimeError, match="a kernel"):
        throughput._rates(SINGLE, made(SINGLE), QUICK, torch.device("cpu"))


def test_with_ceilings_rows_have_bounds():
    rates = throughput._rates(SINGLE, made(SINGLE), throughput.replace(QUICK, ceilings=TOP), torch.device("cpu"))
    macs = count_flops(made(SINGLE)(), (1, 3, 32, 32)).total
    assert rates["inference_bound_images_per_second"] == pytest.approx(1e9 / (2 * macs))
    assert rates["training_bound_images_per_second"] == pytest.approx(1e9 / (6 * macs))


def test_the_bound_by_bandwidth_moves_images_logits_and_weights():
    model = nn.Linear(4, 10, bias=False)
    model.num_classes = 10
    slow = TOP | {"flops_per_second": 1e20, "bytes_per_second": 2.0}  # one number of bf16 a second
    assert throughput.bounds(model, (3, 4), ["inference", "training"], slow) == {
        "inference_bound_images_per_second": 3 / (3 * 4 + 3 * 10 + 4 * 10),
        "training_bound_images_per_second": 3 / (3 * 4 + 3 * 10 + 3 * 4 * 10),
    }
    assert set(throughput.bounds(model, (3, 4), throughput.passes(SPARSE), slow)) == {
        "inference_bound_images_per_second"
    }


@pytest.mark.parametrize(("error", "gradient", "right"), [(2, 2, True), (2.1, 1, False), (1, 2.1, False)])
def test_errors_are_held_against_those_of_plain_bf16(error, gradient, right):
    row = {"error": error, "plain_error": 1, "gradient_error": gradient, "plain_gradient_error": 1}
    assert throughput.is_right(row) == right
    assert not throughput.is_right(row | {"error": float("nan")})
    inference = {"error": error, "plain_error": 1}
    assert throughput.is_right(inference) == (error <= 2)
    assert not throughput.is_right(inference | {"error": float("nan")})


@pytest.mark.parametrize("strategy", throughput.STRATEGIES)
def test_two_processes(strategy):
    case = Case("t2t_vit_tiny", "stl t=4 r=16", 2, devices=2, strategy=strategy)
    rates = throughput.measure(case, made(case), QUICK)
    assert set(rates) == {"training_images_per_second"}
    assert rates["training_images_per_second"] > 0


def test_the_median_of_the_blocks_behind_the_first(monkeypatch):
    ends = iter([100, 6, 2, 4])  # seconds of each block
    moments = []

    def clock() -> float:
        moments.append(0 if len(moments) % 2 == 0 else next(ends))
        return moments[-1]

    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    assert throughput.seconds_a_call(lambda: None, How(repeats=3, calls=2), torch.device("cpu")) == 2


@pytest.fixture
def calls(monkeypatch):
    """Cases that were measured, instead of measuring: 100 images a second on one device, 150 on two."""
    calls = []

    def measure(case, linear, how):
        calls.append(case)
        return {"training_images_per_second": 100.0 if case.devices == 1 else 150.0, "peak_memory_gib": 1.0}

    monkeypatch.setattr(throughput, "measure", measure)
    return calls


def measure_all(out, *groups, here=HERE):
    throughput.measure_all([list(group) for group in groups], [16], QUICK, out, here)
    return json.loads(out.read_text())["models"]


def test_efficiency_compares_with_one_device(tmp_path, calls, capsys):
    single, double = measure_all(tmp_path / "file.json", [SINGLE, DDP])
    assert (single["devices"], single["strategy"], "scaling_efficiency" in single) == (1, None, False)
    assert (double["devices"], double["strategy"], double["scaling_efficiency"]) == (2, "ddp", 0.75)
    assert "scaling efficiency 0.750" in capsys.readouterr().out


def test_other_layers_are_compared_with_the_first_of_their_group(tmp_path, calls):
    stl = Case("t2t_vit_tiny", "stl t=4 r=16", 2, backend="triton", fused="mlps")
    dense, fused = measure_all(tmp_path / "file.json", [SINGLE, stl])
    assert "training_ratio" not in dense
    assert fused["training_ratio"] == 1.0
    assert (fused["backend"], fused["fused"]) == ("triton", "mlps")


def test_rows_that_the_file_has_are_not_measured_again(tmp_path, calls):
    out = tmp_path / "file.json"
    measure_all(out, [SINGLE])
    other = Case("t2t_vit_tiny", "stl t=4 r=16", 2)
    assert len(measure_all(out, [SINGLE], [other])) == 2
    assert calls == [SINGLE, other]


def test_one_device_is_measured_in_the_same_call_as_several(tmp_path, calls):
    out = tmp_path / "file.json"
    measure_all(out, [SINGLE])
    rows = measure_all(out, [SINGLE, DDP])
    assert calls == [SINGLE, SINGLE, DDP]
    assert [row["devices"] for row in rows] == [1, 2]


def test_a_stopped_program_keeps_its_rows(tmp_path, calls, monkeypatch):
    def fails(case, linear, how):
        raise KeyboardInterrupt

    out = tmp_path / "file.json"
    measure_all(out, [SINGLE])
    monkeypatch.setattr(throughput, "measure", fails)
    with pytest.raises(KeyboardInterrupt):
        measure_all(out, [SINGLE], [DDP])
    assert len(json.loads(out.read_text())["models"]) == 1


@pytest.mark.parametrize("key", ["gpu", "driver", "versions", "git_commit"])
def test_a_file_of_another_machine_or_version_is_refused(key, tmp_path, calls):
    out = tmp_path / "file.json"
    measure_all(out, [SINGLE])
    with pytest.raises(SettingError, match=rf".*file.json is of another .*{key} was .*, is new.*give another file"):
        measure_all(out, [DDP], here=HERE | {key: "new"})
    assert calls == [SINGLE]


def test_another_date_is_no_other_machine(tmp_path, calls):
    measure_all(tmp_path / "file.json", [SINGLE])
    assert len(measure_all(tmp_path / "file.json", [SINGLE], here=HERE | {"date": "tomorrow"})) == 1


def run(monkeypatch, tmp_path, *words):
    groups = []
    monkeypatch.setattr(throughput, "measure_all", lambda cases, *_: groups.extend(cases))
    monkeypatch.setattr(throughput, "machine", dict)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--out", str(tmp_path / "file.json"), *words])
    run_main(throughput.main)
    return groups


def test_the_command_line(monkeypatch, tmp_path):
    usual = run(monkeypatch, tmp_path)
    assert [(case.model, case.linear) for (case,) in usual] == [
        (f"t2t_vit_{depth}", linear) for depth in (7, 14) for linear in ("dense", "stl t=4 r=16", "stl t=4 r=24")
    ]
    names = {case.model.removeprefix("t2t_vit_") for (case,) in run(monkeypatch, tmp_path, "--models", "all")}
    assert names == {"7", "10", "12", "14", "19", "24", "t_14", "t_19", "t_24"}
    words = ["--models", "t2t_vit_7", "--rank", "24", "--devices", "2", "--strategy", "ddp", "fsdp2"]
    assert [[(case.devices, case.strategy) for case in group] for group in run(monkeypatch, tmp_path, *words)] == [
        [(1, None), (2, "ddp"), (2, "fsdp2")]
    ] * 2


def test_too_few_gpus(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"error: this measures 3 GPU\(s\) and finds 2"):
        run(monkeypatch, tmp_path, "--devices", "3")
