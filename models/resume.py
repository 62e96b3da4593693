"""Where a run begins: anew, with what its folder holds, or with a checkpoint from elsewhere."""

from pathlib import Path
from typing import Any

from models.checkpoint import load_checkpoint, newest_first
from stl import SettingError

# Of the data's settings those that only say where and how it is read.
_WHERE = {"root", "val_root", "packed", "cache", "download"}
READING = _WHERE | {"num_workers", "pin_memory", "device_batch_size", "eval_batch_size", "max_unreadable"}
# What makes a run the run it is: all of these groups but READING, and of others what changes its numbers.
_GROUPS = ("data", "model", "linear", "optimizer", "scheduler", "augment", "distillation")
_OF_OTHERS = {"trainer": ("precision", "gradient_clip_val"), "callbacks": ("ema",)}


def starting_point(folder: Path, ckpt_path: str | None, config: dict[str, Any]) -> tuple[dict[str, Any], Path] | None:
    """The checkpoint that a run goes on from, with its file, or None where it starts anew.

    Args:
        folder: of the run.
        ckpt_path: "last" for the folder's own newest readable checkpoint, a file, or None.
        config: the resolved configuration.

    Raises SettingError where the folder holds a run and this is not it.
    """
    if ckpt_path not in (None, "last"):
        if _holds_a_run(folder):
            raise SettingError(f"the run folder {str(folder)!r} holds a run already; set hydra.run.dir to another")
        return load_checkpoint(ckpt_path)
    if not _holds_a_run(folder):
        return None
    if ckpt_path is None:
        raise SettingError(
            f"the run folder {str(folder)!r} holds a run already; ckpt_path=last goes on with it, "
            "or set hydra.run.dir to another"
        )
    files = newest_first(folder / "checkpoints")
    if not files:
        raise SettingError(
            f"the run folder {str(folder)!r} holds a run without checkpoints; set hydra.run.dir to another"
        )
    checkpoint, path = load_checkpoint(files[0])
    if changed := _differences(checkpoint["config"], config):
        raise SettingError(
            f"the run folder {str(folder)!r} holds a run with other settings: {'; '.join(changed)}; make them agree to "
            "go on with it, or set hydra.run.dir to another"
        )
    return checkpoint, path


def _holds_a_run(folder: Path) -> bool:
    return (folder / "summary.json").exists() or bool(newest_first(folder / "checkpoints"))


def _differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings that make this another run than the saved one, each with both values."""
    changed = [
        f"{key} was {saved.get(key)}, is {ours[key]}"
        for key in ("seed", "label_smoothing")
        if saved.get(key) != ours[key]
    ]
    for group, keys in {**dict.fromkeys(_GROUPS, ()), **_OF_OTHERS}.items():
        theirs, own = saved.get(group) or {}, ours.get(group) or {}
        for key in keys or dict.fromkeys([*theirs, *own]):
            if not (group == "data" and key in READING) and theirs.get(key) != own.get(key):
                changed.append(f"{group}.{key} was {theirs.get(key)}, is {own.get(key)}")
    return changed
