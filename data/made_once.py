"""Folders of what takes long to make: made from a recipe, once, whole or not at all, by one of those that ask."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.locks import locked
from stl.errors import SettingError

ABOUT = "about.json"

Recipe = dict[str, Any]  # in JSON's types; all that the content depends on


def made_once(root: Path, kind: str, recipe: Recipe, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, Any]:
    """The folder `<root>/<kind>-<digest of the recipe>`, and what its about.json says.

    Another recipe is another folder. What an interrupted process left is made again.

    Args:
        root: where the folder is, or will be.
        kind: what it holds, in one word.
        recipe: beside what `make` returns, it becomes about.json.
        make: fills an empty folder with files, and returns what is to be known of them.

    Raises:
        SettingError: `root` cannot be written to, or about.json is damaged or another folder's; all that `make` raises.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"{kind}-{digest}"
    if not folder.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{folder.name}.lock", f"makes {folder}"):
                if not folder.is_dir():
                    _make(folder, recipe, make)
        except OSError as error:
            raise SettingError(
                f"data.packed={str(root)!r} cannot be written to ({' '.join(str(error).split())}); make room there, or "
                "set data.packed to another folder"
            ) from error
    return folder, _about(folder, recipe)


def _make(folder: Path, recipe: Recipe, make: Callable[[Path], dict[str, Any]]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # a killed process left it
    try:
        part.mkdir()
        about = {"recipe": recipe, **make(part)}
        (part / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _about(folder: Path, recipe: Recipe) -> Any:
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text())
        own = about["recipe"] == json.loads(json.dumps(recipe))
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(file, "it is not readable") from None
    if not own:
        raise damaged(file, "it is of other settings")
    return about


def damaged(file: Path, how: str) -> SettingError:
    """For a file in such a folder."""
    return SettingError(f"{file} is damaged: {how}; remove {file.parent}, and it is made again")
