"""scripts/flops_llm.py: what a token costs."""

import json
import sys

import flops_llm
import pytest
from bench_llm import configuration
from llamas import SIZES
from omegaconf import OmegaConf

from stl import SettingError


def test_a_token_of_each_kind_costs_what_its_matrices_say(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    small = OmegaConf.merge(configuration("llama_small"), {**SIZES, "vocab_size": 40})
    monkeypatch.setattr(flops_llm, "configuration", lambda model: small)
    words = ["--models=llama_small", "--ranks", "16", "--length=8", "--batches", "1", "4", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["flops_llm.py", *words])
    flops_llm.main()
    dense, sparse, stl, merged, alone, four = json.loads((tmp_path / "flops_llm.json").read_text())
    swapped = 2 * (24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 36)  # queries, keys and values, output, MLP
    assert dense["macs"]["linear"] == 8 * (swapped + 24 * 40)
    assert sparse["macs"]["linear"] == 8 * (swapped / 2 + 24 * 40)
    assert stl["macs"]["core"] == merged["macs"]["core"] == 8 * (swapped / 4 + 24 * 40)
    encoded = 24 * 16  # a token of an encode of width 24, three of which are spared in each of two blocks
    assert stl["macs"]["linear"] - merged["macs"]["linear"] == 8 * 2 * 3 * encoded
    head = 8 * 24 * 40  # of a sequence; a tile of the batch is whole, whoever fills it
    assert alone["macs"]["linear"] - head == four["macs"]["linear"] - 4 * head
    assert four["macs"]["linear"] == 4 * merged["macs"]["linear"]
    assert f"| {dense['macs']['total'] / 8 / 1e6:.1f} |" in (tmp_path / "flops_llm.md").read_text()


def test_a_model_of_images_is_one_line():
    with pytest.raises(SettingError, match=r"^--models t2t_vit is no language model; give some of configs/model/"):
        configuration("t2t_vit")
