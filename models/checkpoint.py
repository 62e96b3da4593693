"""Read checkpoints that may be truncated, foreign or hostile."""

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from stl import SettingError

log = logging.getLogger(__name__)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint and the file it came from: `path`, or the newest readable one beside it where it is damaged.

    Only tensors and plain values are loaded (weights_only), so that a file never runs code.
    Raises SettingError where the file is missing, is not a checkpoint of ours, or no readable one is left.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"checkpoint {str(path)!r} does not exist; give the path of a .ckpt file")
    others = sorted(path.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
    real = path.resolve()
    for candidate in [path, *(other for other in others if other.resolve() != real)]:
        try:
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if _is_zip(candidate):
                raise SettingError(
                    f"checkpoint {str(candidate)!r} holds more than tensors and plain values, which would run code on "
                    "loading; use one that this project wrote"
                ) from error
            log.warning("checkpoint %s is damaged; trying the one before it", candidate)
            continue
        except (RuntimeError, EOFError, OSError, ValueError, KeyError):
            log.warning("checkpoint %s is damaged; trying the one before it", candidate)
            continue
        if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
            raise SettingError(f"checkpoint {str(candidate)!r} is not one that train.py wrote: it has no config")
        return checkpoint, candidate
    raise SettingError(f"checkpoint {str(path)!r} is damaged and no readable one is beside it; train again")


def _is_zip(path: Path) -> bool:
    return zipfile.is_zipfile(path)
