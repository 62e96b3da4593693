"""scripts/bench_llm.py: every way in both phases, checked and timed, on a small model."""

import json
import sys

import bench_llm
import benchmarking
import pytest
from llamas import SIZES
from omegaconf import OmegaConf

from stl import SettingError


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """What runs the script with these words, and returns what it wrote."""
    pytest.importorskip("transformers")
    small = OmegaConf.merge(bench_llm.configuration("llama_small"), {**SIZES, "num_hidden_layers": 1})
    monkeypatch.setattr(bench_llm, "configuration", lambda model: small)
    monkeypatch.setattr(benchmarking, "SECONDS", 1e-4)
    top = {"bytes_per_second": 1e10, "flops_per_second": 1e11}
    monkeypatch.setattr(benchmarking, "ceilings", lambda device, dtype: top)
    out = tmp_path / "llm.json"
    words = ["--models=llama_small", "--batch=2", "--length=9", "--steps=5", "--ranks", "16", "--backends", "torch"]

    def run(*more: str) -> list[dict]:
        argv = ["bench_llm.py", *words, "--device=cpu", "--dtype=float32", f"--out={out}", *more]
        monkeypatch.setattr(sys, "argv", argv)
        bench_llm.main()
        return json.loads(out.read_text())["rows"]

    return run


def test_every_way_is_measured_in_both_phases(bench):
    rows = bench()
    names = ["dense", "stl t=4 r=16 over tokens, torch", "stl t=4 r=16 over batch, torch"]
    names += [f"{name}, merged" for name in names]
    assert [(row["phase"], row["method"]) for row in rows] == [(p, n) for p in ("prefill", "decode") for n in names]
    assert all(row["error"] < 1e-5 and row["tokens_per_second"] > 0 and row["ratio"] > 0 for row in rows)
    assert [row["tokens"] for row in rows] == [18] * 6 + [10] * 6
    assert [row["merged"] for row in rows] == 2 * (3 * [False] + 3 * [True])


def test_rows_that_are_not_measured_again_stay(bench, monkeypatch):
    once = bench("--phases", "decode", "--projections", "apart", "--ways", "tokens")
    rows = bench("--ways", "tokens", "--phases", "decode", "--projections", "apart", "--ranks", "24", "16")
    names = ["dense", "stl t=4 r=24 over tokens, torch", "stl t=4 r=16 over tokens, torch"]
    assert [row["method"] for row in rows] == names
    assert rows[0] not in once
    assert bench("--phases", "prefill", "--projections", "merged", "--ways", "batch")[:3] == rows
    *_, small = bench("--phases", "decode", "--projections", "apart", "--ways", "tokens", "--tile", "2", "--ranks", "4")
    assert (small["method"], small["tile"], small["rank"]) == ("stl t=2 r=4 over tokens, torch", 2, 4)
    with pytest.raises(SettingError, match="basis='causal' has no tile=2 rank=16"):
        bench("--tile", "2")
    monkeypatch.setattr(benchmarking, "git_commit", lambda: "another")
    with pytest.raises(SettingError, match=r"^\S+llm\.json is of another .* \(git_commit was .*, is another\); give"):
        bench()
