"""scripts/bench_models.py: which models and layers it measures, and what they are compared with."""

import json
import sys

import bench_models
import benchmarking
import pytest
import throughput
import torch
from sparse_kernels import emulate

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU only")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
ERRORS = {f"{plain}{name}": 0.01 for plain in ("", "plain_") for name in ("error", "gradient_error")}


TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e9}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_models, "ceilings", lambda device, dtype: TOP)


def run(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["bench_models.py", "--device=cpu", f"--out={out}", *words])
    benchmarking.run_main(bench_models.main)


@pytest.fixture
def measured(monkeypatch):
    """Cases and how they were measured, instead of measuring: kernels are twice as fast, fused ones wrong."""
    measured = []

    def measure(case, linear, how):
        measured.append((case, linear, how))
        rate = 200.0 if case.backend == "triton" else 100.0
        rates = {"inference_images_per_second": rate, "training_images_per_second": rate / 2}
        return ERRORS | ({} if case.fused else rates)

    monkeypatch.setattr(throughput, "measure", measure)
    return measured


@needs_interpreter
def test_each_model_is_compared_with_its_dense_twin(tmp_path, measured, monkeypatch, capsys):
    out = tmp_path / "folder" / "models.json"
    run(monkeypatch, out, "--backends", "torch", "triton")
    written = json.loads(out.read_text())
    layers = [("dense", "auto", None)]
    layers += [
        ("stl t=4 r=16", backend, fused) for backend, fused in (("torch", None), ("triton", None), ("triton", "blocks"))
    ]
    rows = written["models"]
    assert [(row["model"], row["linear"], row["backend"], row["fused"]) for row in rows] == [
        (model, *layer) for model in bench_models.MODELS for layer in layers
    ]
    assert [row.get("inference_ratio") for row in rows[:4]] == [None, 1.0, 2.0, None]
    assert [row.get("training_ratio") for row in rows[:4]] == [None, 1.0, 2.0, None]
    dense, *_, kernels, wrong = capsys.readouterr().out.splitlines()
    assert "inference 200 images/s   2.00× dense   training 100 images/s   2.00× dense" in kernels
    assert wrong.endswith("WRONG, not timed")
    assert "× dense" not in dense
    assert (written["machine"]["compile"], written["machine"]["image_size"]) == ("reduce-overhead", 224)


@needs_interpreter
def test_what_the_file_has_is_not_measured_again(tmp_path, measured, monkeypatch):
    for _ in range(2):
        run(monkeypatch, tmp_path / "file.json", "--models", "t2t_vit_7", "--backends", "torch")
    assert len(measured) == 2
    run(monkeypatch, tmp_path / "file.json", "--models", "t2t_vit_7", "--backends", "triton", "--ranks", "24")
    assert len(measured) == 5  # dense again: what is compared are numbers of one call
    assert measured[-1][1].keywords["linear"].keywords == {"tile": 4, "rank": 24, "basis": "frame"}


def test_the_command_line_says_how(tmp_path, measured, monkeypatch):
    words = ["--models", "t2t_vit_7", "--backends", "torch", "--batch-size", "2", "--image-size", "64"]
    run(monkeypatch, tmp_path / "file.json", *words, "--repeats", "3", "--compile", "none")
    case, _, how = measured[-1]
    assert case.batch_size == 2
    assert (how.image_size, how.repeats, how.compile_mode, how.device) == (64, 3, None, "cpu")


def test_on_a_gpu_2_4_stands_behind_dense():
    cases = bench_models.group("t2t_vit_7", [16], ["torch"], 8, "cuda")
    assert [case.linear for case in cases] == ["dense", "2:4", "stl t=4 r=16"]
    assert "2:4" not in [case.linear for case in bench_models.group("t2t_vit_7", [16], ["torch"], 8, "cpu")]


def test_2_4_of_a_model_of_timm(monkeypatch):
    emulate(monkeypatch)
    case = throughput.Case("deit_tiny_patch16_224", "2:4", 1)
    how = throughput.How(1, 1, image_size=32, compile_mode=None, device="cpu", ceilings=TOP)
    make = throughput.build(case, throughput.linears([])["2:4"], how)
    rates = throughput._rates(case, make, how, torch.device("cpu"))
    assert rates["left_dense"] == ["head"]
    assert rates["inference_images_per_second"] > 0
    dense = throughput.bounds(make.args[0](), (1, 3, 32, 32), ["inference"], TOP)["inference_bound_images_per_second"]
    assert 1.5 * dense < rates["inference_bound_images_per_second"] < 2 * dense


@needs_gpu
def test_2_4_on_a_gpu():
    case = throughput.Case("deit_tiny_patch16_224", "2:4", 16)
    how = throughput.How(1, 1, ceilings=TOP)
    make = throughput.build(case, throughput.linears([])["2:4"], how)
    rates = throughput._rates(case, make, how, torch.device("cuda"))
    assert "refused" not in rates
    assert rates["inference_images_per_second"] > 0


def test_a_model_of_timm(tmp_path, monkeypatch, capsys):
    """In this process, as measure() does it in another."""

    def measure(case, linear, how):
        quick = throughput.replace(how, repeats=1, calls=1)
        return throughput._rates(case, linear, quick, torch.device("cpu"))

    monkeypatch.setattr(throughput, "measure", measure)
    words = ["--models", "deit_tiny_patch16_224", "--backends", "torch", "--batch-size", "1", "--image-size", "32"]
    run(monkeypatch, tmp_path / "file.json", *words, "--compile", "none")
    written = json.loads((tmp_path / "file.json").read_text())
    assert written["ceilings"] == TOP
    dense, stl = written["models"]
    for name in ("inference", "training"):
        assert 0 < dense[f"{name}_bound_images_per_second"] < stl[f"{name}_bound_images_per_second"]
    assert f"bound {dense['training_bound_images_per_second']:.0f} images/s" in capsys.readouterr().out
    assert stl["inference_ratio"] == stl["inference_images_per_second"] / dense["inference_images_per_second"]
    assert 0 < stl["error"] == stl["plain_error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device=cuda"], "there is no GPU; --device cpu measures the CPU"),
        (["--models", "t2t_vit_8"], "model.name='t2t_vit_8' is unknown; close to it: "),
        (["--ranks", "200"], "rank"),
        (["--backends", "triton", "--ranks", "65"], "rank"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{said}[^\n]*$"):
        run(monkeypatch, tmp_path / "file.json", *words)
    assert measured == []
