"""Read checkpoints that may be truncated, foreign or hostile."""

import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stl import SettingError

log = logging.getLogger(__name__)

KEPT = "tokenizer"  # the folder in that of a run where the data module keeps what it learned


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by the steps in their names; without `last.ckpt`, which is one of them."""
    own = [path for path in folder.glob("*.ckpt") if re.fullmatch(r"\d+-\d+", path.stem)]
    return sorted(own, key=lambda path: int(path.stem.partition("-")[2]), reverse=True)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint and the file it came from: `path`, or the newest readable one beside it where it is damaged.

    Only tensors and plain values are loaded (weights_only), so that a file never runs code.
    Raises SettingError where the file is missing, is not a checkpoint of ours, or no readable one is left.
    """
    path = Path(path)
    if path.is_dir():
        raise SettingError(f"checkpoint {str(path)!r} is a folder; give a .ckpt file, of a run checkpoints/last.ckpt")
    if not path.is_file():
        raise SettingError(f"checkpoint {str(path)!r} does not exist; give the path of a .ckpt file")
    real = path.resolve()
    others = newest_first(path.parent)
    for candidate in [path, *(other for other in others if other.resolve() != real)]:
        try:
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if zipfile.is_zipfile(candidate):
                raise SettingError(
                    f"checkpoint {str(candidate)!r} holds more than tensors and plain values, which would run code on "
                    "loading; use one that this project wrote"
                ) from error
            log.warning("checkpoint %s is damaged; trying the one before it", candidate)
            continue
        except (RuntimeError, EOFError, OSError, ValueError, KeyError):
            log.warning("checkpoint %s is damaged; trying the one before it", candidate)
            continue
        if not (isinstance(checkpoint, dict) and {"state_dict", "config"} <= set(checkpoint)) or not {
            *_IDENTITY,
            "data",
        } <= set(checkpoint["config"]):
            raise SettingError(f"checkpoint {str(candidate)!r} is not one that train.py wrote: it has no config")
        return checkpoint, candidate
    raise SettingError(f"checkpoint {str(path)!r} is damaged and no readable one is beside it; train again")


def check_there(setting: str, source: str | None) -> None:
    """Raises SettingError where a setting names a file of weights that does not exist; a folder may be a hub's name."""
    if not isinstance(source, str | None):
        raise SettingError(f"{setting}={source!r} must be a path, or a name on the Hugging Face hub")
    if source is not None and source.endswith((".ckpt", ".bin")) and not Path(source).exists():
        raise SettingError(f"{setting}={source!r} does not exist; give the path of a .ckpt or .bin file")


def check_vocabulary(checkpoint: dict[str, Any], path: Path, ours: str | None) -> None:
    """Raises SettingError, with both sides, where token ids mean other text than to the checkpoint.

    Args:
        ours: the `vocabulary` of a data module, None for images. Earlier checkpoints have none either, and pass.
    """
    source = checkpoint["config"]["data"].get("_target_", "").rpartition(".")[2]
    theirs = checkpoint.get(source, {}).get("vocabulary")
    if None not in (theirs, ours) and theirs != ours:
        raise SettingError(
            f"checkpoint {str(path)!r} has another vocabulary ({theirs}) than data.tokenizer ({ours}); set "
            "data.tokenizer to that of its run, whose folder keeps a learned one in tokenizer/, or give the run's text"
        )


# What LLaMAs may differ in with weights of the same shapes; what is not said is the default of transformers.
UNSHAPED: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
UNSHAPED += ("rms_norm_eps", "rope_parameters", "tie_word_embeddings")

# What a checkpoint must share with the run that goes on from it, beyond the shapes of its weights.
_IDENTITY = {
    "model": ("name", "token_order", "strides", "linear_groups", "merged"),
    "linear": ("_target_", "tile", "rank", "basis", "row_axis", "train_basis", "train_weight", "factor", "window"),
}
_BEFORE = {"model": {"merged": False}}  # what checkpoints from before a setting existed have


def load_weights(task: nn.Module, checkpoint: dict[str, Any], path: Path, config: dict[str, Any]) -> None:
    """Put the checkpoint's weights into `task`, which `config` describes.

    Raises SettingError, with both sides, where the two are of different models.
    """
    saved = checkpoint["config"]
    differences = []
    for group, keys in _IDENTITY.items():
        theirs, ours = _BEFORE.get(group, {}) | saved[group], config[group]
        for key in keys:
            if key in theirs and key in ours and theirs[key] != ours[key]:
                differences.append(f"{group}.{key}={theirs[key]} in the checkpoint, {ours[key]} here")
    for key in UNSHAPED:
        if (theirs := saved["model"].get(key)) != (ours := config["model"].get(key)):
            differences.append(f"model.{key}={theirs} in the checkpoint, {ours} here")
    if differences:
        raise SettingError(
            f"checkpoint {str(path)!r} is of another model: {'; '.join(differences)}; make the settings agree"
        )
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" and {len(reasons) - 2} more" if len(reasons) > 2 else ""
        raise SettingError(f"checkpoint {str(path)!r} does not fit: {' '.join(reasons[:2])}{more}") from error
