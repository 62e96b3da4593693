"""Dense weights that fit, and those that only their settings show to be another model's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import SIZES

from stl import SettingError

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from models.language.llama import STLLlamaConfig, STLLlamaForCausalLM
from models.language.pretrained import read_weights

OWN = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 32}
VOCABULARY = 40


def config(**settings: Any) -> STLLlamaConfig:
    return STLLlamaConfig(**{**OWN, "vocab_size": VOCABULARY, **settings})


@pytest.fixture
def model() -> STLLlamaForCausalLM:
    torch.manual_seed(0)
    return STLLlamaForCausalLM(config())


def checkpoint(folder: Path, model: torch.nn.Module, **parts: Any) -> str:
    """What train.py writes of it."""
    settings = {"_target_": "models.language.build.build_llama", "name": "small", "vocab_size": None, "weights": None}
    content = {
        "config": {
            "model": {**settings, **OWN},
            "linear": {"_target_": "torch.nn.Linear"},
            "data": {"_target_": "data.text_files.TextFiles"},
        },
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
    }
    torch.save(content | parts, folder / "dense.ckpt")
    return str(folder / "dense.ckpt")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_a_checkpoint_says_its_own_sizes(tmp_path, model):
    again = read_weights(checkpoint(tmp_path, model))
    assert same(again, model)
    assert again.config.to_dict() == model.config.to_dict()
    longer = read_weights(checkpoint(tmp_path, model), config(max_position_embeddings=64))
    assert longer.config.max_position_embeddings == 64


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("num_attention_heads", 2, "4"),
        ("hidden_act", "gelu", "silu"),
        ("rms_norm_eps", 1e-5, "1e-06"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}, "{.*10000.0.*}"),
        ("tie_word_embeddings", True, "False"),
        ("intermediate_size", 40, "36"),
    ],
)
def test_other_settings_are_refused_wherever_the_weights_are(tmp_path, model, key, value, theirs):
    model.save_pretrained(tmp_path / "folder")
    own = config(**{key: value, **({"num_key_value_heads": 1} if value == 2 else {})})
    for source in (checkpoint(tmp_path, model), str(tmp_path / "folder")):
        with pytest.raises(SettingError, match=f"^model.weights='{source}' has {key}={theirs}, model.{key} is "):
            read_weights(source, own)


def test_token_ids_of_another_meaning_are_refused(tmp_path, model):
    source = checkpoint(tmp_path, model, TextFiles={"epoch": 1, "batches": 0, "vocabulary": "40 tokens, sha256 a"})
    assert same(read_weights(source, vocabulary="40 tokens, sha256 a"), model)
    message = r"has another vocabulary \(40 tokens, sha256 a\) than data.tokenizer \(bytes\); set data.tokenizer to"
    with pytest.raises(SettingError, match=message):
        read_weights(source, vocabulary="bytes")
    assert same(read_weights(checkpoint(tmp_path, model), vocabulary="bytes"), model)  # an earlier one


def test_checkpoints_that_hold_no_such_model(tmp_path, model):
    with pytest.raises(SettingError, match=r"dense.ckpt' is of no language model; give one of task=models.language"):
        read_weights(checkpoint(tmp_path, torch.nn.Linear(2, 2)))
    state = {"model.model.embed_tokens.weight": torch.zeros(VOCABULARY, 24)}
    with pytest.raises(SettingError, match=r"dense.ckpt' does not fit: Missing key"):
        read_weights(checkpoint(tmp_path, model, state_dict=state))


def test_folders_of_a_dense_model_are_read_whoever_wrote_them(tmp_path, model):
    model.save_pretrained(tmp_path / "ours")
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **OWN))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert same(read_weights(str(tmp_path / name), config()), model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_that_lacks_weights_is_refused(tmp_path, tied):
    model, source = STLLlamaForCausalLM(config(tie_word_embeddings=tied)), str(tmp_path)
    model.save_pretrained(source)
    assert same(read_weights(source), model)
    left = {name: value for name, value in model.state_dict().items() if "gate_proj" not in name}
    model.save_pretrained(source, state_dict=left)
    with pytest.raises(SettingError, match=r"cannot be loaded \(the folder has no model.layers.0.mlp.gate_proj.weight"):
        read_weights(source)


def test_a_folder_whose_weights_are_cut_short_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SettingError, match=r"^model.weights='.*' cannot be loaded \(.*incomplete.*\); give a .ckpt"):
        read_weights(str(tmp_path))


def test_folders_of_other_models_are_refused_once(tmp_path, model):
    model.convert(basis="causal", tile=2, rank=6)
    model.save_pretrained(tmp_path)
    with pytest.raises(SettingError) as caught:
        read_weights(str(tmp_path))
    source = f"model.weights={str(tmp_path)!r}"
    assert str(caught.value) == f"{source} is a LLaMA with STL layers; a dense LLaMA is needed"
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SettingError) as caught:
        read_weights(str(tmp_path))
    assert str(caught.value) == f"{source} is a GPT2Config; a dense LLaMA is needed"


def test_weights_are_merged_where_that_is_asked_for(tmp_path, model):
    sources = [checkpoint(tmp_path, model), str(tmp_path / "folder")]
    model.save_pretrained(sources[1])
    merged = copy.deepcopy(model)
    merged.merge()
    for source in sources:
        assert same(read_weights(source, config(merged=True)), merged)
        assert same(read_weights(source, config()), model)


def test_merged_weights_are_split_where_that_is_asked_for(tmp_path, model):
    merged, source = copy.deepcopy(model), str(tmp_path / "folder")
    merged.merge()
    merged.save_pretrained(source)
    own = {"_target_": "models.language.build.build_llama", "vocab_size": None, "merged": True, **OWN}
    settings = {
        "model": own,
        "linear": {"_target_": "torch.nn.Linear"},
        "data": {"_target_": "data.text_files.TextFiles"},
    }
    for place in (source, checkpoint(tmp_path, merged, config=settings)):
        assert same(read_weights(place, config(merged=True)), merged)
        assert same(read_weights(place), merged)
        assert same(read_weights(place, config()), model)
