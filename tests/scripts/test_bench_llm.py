"""scripts/bench_llm.py: every way in both phases, checked and timed, on a small model."""

import json
import sys

import bench_llm
import benchmarking
import pytest
from llamas import SIZES
from omegaconf import OmegaConf


def test_every_way_is_measured_in_both_phases(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    small = OmegaConf.merge(bench_llm.configuration("llama_small"), {**SIZES, "num_hidden_layers": 1})
    monkeypatch.setattr(bench_llm, "configuration", lambda model: small)
    monkeypatch.setattr(benchmarking, "SECONDS", 1e-4)
    top = {"bytes_per_second": 1e10, "flops_per_second": 1e11}
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: top)
    out = tmp_path / "llm.json"
    words = ["--models=llama_small", "--batch=2", "--length=9", "--steps=5", "--ranks", "16", "--backends", "torch"]
    monkeypatch.setattr(sys, "argv", ["bench_llm.py", *words, "--device=cpu", "--dtype=float32", f"--out={out}"])
    bench_llm.main()
    rows = json.loads(out.read_text())["rows"]
    names = ["dense", "stl r=16 over tokens, torch", "stl r=16 over batch, torch"]
    names += [f"{name}, merged" for name in names]
    assert [(row["phase"], row["method"]) for row in rows] == [(p, n) for p in ("prefill", "decode") for n in names]
    assert all(row["error"] < 1e-5 and row["tokens_per_second"] > 0 and row["ratio"] > 0 for row in rows)
    assert [row["tokens"] for row in rows] == [18] * 6 + [10] * 6
    assert [row["merged"] for row in rows] == 2 * (3 * [False] + 3 * [True])
