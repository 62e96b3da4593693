"""Checkpoints that are missing, truncated, foreign or hostile."""

import logging
import os

import pytest
import torch
from torch import nn

from models.checkpoint import check_vocabulary, load_checkpoint, load_weights
from stl import SettingError


def save(path, epoch):
    torch.save(
        {
            "config": {"model": {}, "linear": {}, "data": {}},
            "state_dict": {"weight": torch.arange(1000.0)},
            "epoch": epoch,
        },
        path,
    )
    return path


def test_a_sound_checkpoint_is_read(tmp_path):
    checkpoint, path = load_checkpoint(save(tmp_path / "last.ckpt", 3))
    assert checkpoint["epoch"] == 3
    assert path == tmp_path / "last.ckpt"


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, -1])
def test_a_truncated_one_falls_back_to_the_one_before_and_says_so(tmp_path, keep, caplog):
    save(tmp_path / "001-00000010.ckpt", 1)
    save(tmp_path / "002-00000020.ckpt", 2)
    newest = save(tmp_path / "003-00000030.ckpt", 3)
    newest.write_bytes(newest.read_bytes()[:keep])
    (tmp_path / "last.ckpt").symlink_to("003-00000030.ckpt")
    with caplog.at_level(logging.WARNING):
        checkpoint, path = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["epoch"] == 2
    assert path == tmp_path / "002-00000020.ckpt"
    assert "last.ckpt is damaged; trying the one before it" in caplog.text


def test_a_truncated_one_alone_is_an_error(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SettingError, match="is damaged and no readable one is beside it"):
        load_checkpoint(path)


def test_a_missing_one_is_an_error(tmp_path):
    with pytest.raises(SettingError, match=r"nothing\.ckpt' does not exist; give the path of a .ckpt file"):
        load_checkpoint(tmp_path / "nothing.ckpt")


class Hostile:
    """What a pickle that runs code looks like."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"config": {}, "state_dict": Hostile(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(SettingError, match="would run code on loading"):
        load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_another_program_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(SettingError, match=r"is not one that train.py wrote: it has no config"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_a_checkpoint_without_a_whole_config_is_refused(tmp_path):
    torch.save({"config": {"model": {}}, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(SettingError, match=r"is not one that train\.py wrote"):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("group", "key", "saved", "own"),
    [
        ("linear", "tile", 4, 2),
        ("linear", "rank", 16, 24),
        ("linear", "basis", "frame", "random"),
        ("linear", "factor", 2.667, 2.6),
        ("linear", "window", "blocks", "sliding"),
        ("model", "name", "t2t_vit_tiny", "t2t_vit_7"),
        ("model", "token_order", "raster", "block"),
        ("model", "num_attention_heads", 8, 4),
        ("model", "hidden_act", "gelu", None),
        ("model", "rope_parameters", "{'rope_theta': 500.0}", "{'rope_theta': 10000.0}"),
    ],
)
def test_a_checkpoint_of_another_model_shows_both_sides(tmp_path, group, key, saved, own):
    task = nn.Linear(2, 2)
    config = {"model": {"drop_rate": 0.0}, "linear": {}}
    theirs = {**config, group: {**config[group], key: saved}}
    ours = {**config, group: {**config[group], key: own}}
    load_weights(
        task, {"config": theirs, "state_dict": task.state_dict()}, tmp_path, {**theirs, "model": theirs["model"]}
    )
    with pytest.raises(SettingError, match=f"{group}.{key}={saved} in the checkpoint, {own} here"):
        load_weights(task, {"config": theirs, "state_dict": task.state_dict()}, tmp_path, ours)


def test_another_vocabulary_is_shown_where_both_sides_have_one(tmp_path):
    checkpoint = {"config": {"data": {"_target_": "data.text_files.TextFiles"}}, "TextFiles": {"vocabulary": "bytes"}}
    check_vocabulary(checkpoint, tmp_path, "bytes")
    check_vocabulary(checkpoint, tmp_path, None)
    for earlier in ({"TextFiles": {"epoch": 3}}, {"config": {"data": {"_target_": "data.digits.Digits"}}}):
        check_vocabulary(checkpoint | earlier, tmp_path, "300 tokens")
    with pytest.raises(SettingError, match=r"has another vocabulary \(bytes\) than data.tokenizer \(300 tokens\); set"):
        check_vocabulary(checkpoint, tmp_path, "300 tokens")


def test_weights_of_another_shape_are_named(tmp_path):
    config = {"model": {}, "linear": {}}
    checkpoint = {"config": config, "state_dict": nn.Linear(3, 3).state_dict()}
    with pytest.raises(SettingError, match="does not fit: size mismatch for weight"):
        load_weights(nn.Linear(2, 2), checkpoint, tmp_path, config)
