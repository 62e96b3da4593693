"""Models as configurations describe them, beside their data; trained ones of runs with linear=dense: what programs
convert, and record from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from data.datamodule import ImageDataModule
from models.checkpoint import load_checkpoint, load_weights
from models.configured import build_model
from stl import SettingError

FACTS = ("model", "dataset", "epochs", "top1", "overrides")  # of a run, for files that were made from it


def dense_run(folder: Path) -> tuple[nn.Module, ImageDataModule, dict[str, Any]]:
    """The model in evaluation mode, its data, and FACTS of its summary.

    Raises SettingError where the folder holds no run that train.py ended.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        raise SettingError(
            f"--run {folder} has no summary.json; give the folder of a run that train.py ended"
        ) from None
    checkpoint, path = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    model, data = build(OmegaConf.create(checkpoint["config"]))
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")}
    load_weights(nn.ModuleDict({"model": model}), {**checkpoint, "state_dict": weights}, path, checkpoint["config"])
    data.setup("fit")
    return model.eval(), data, {key: summary[key] for key in FACTS}


def build(config: Any) -> tuple[nn.Module, ImageDataModule]:
    """The model that a configuration describes, as it is before training, and its data."""
    data = instantiate(config.data, seed=config.seed)
    return build_model(config, data), data


def batches_of(data: ImageDataModule, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the model takes them, and labels, of "train" or "val"."""
    for images, labels in getattr(data, f"{split}_dataloader")():
        yield (data.normalise(images) if images.dtype == torch.uint8 else images), labels
