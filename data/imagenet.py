"""ImageNet-1K (ILSVRC 2012): an image folder, unpacked from the original archives where it is not there yet."""

import logging
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchvision.datasets.imagenet import (
    ARCHIVE_META,
    parse_devkit_archive,
    parse_train_archive,
    parse_val_archive,
)

from data.datamodule import require
from data.image_folder import ImageFolder
from data.locks import locked
from stl.errors import SettingError

log = logging.getLogger(__name__)

CLASSES = 1000
ARCHIVES = {split: file for split, (file, _) in ARCHIVE_META.items()}  # of "train", "val", "devkit"
_NEEDS = {"train": ("train",), "val": ("val", "devkit")}  # the validation images' classes stand in the devkit
_EXPECTED = (
    f"expected train/<class>/*.JPEG and val/<class>/*.JPEG, or the original archives {', '.join(ARCHIVES.values())}; "
    "put them there or set data.root to another folder"
)


class ImageNet(ImageFolder):
    """`ImageFolder` with a root that may hold the original archives instead of `train/` and `val/`.

    They are unpacked when this is constructed, once: into `<split>.part/`, which is renamed when it is complete. The
    archives stay. The classes are the sorted WordNet ids, as in torchvision.

    Args:
        root: folder with `train/` and `val/`, or with the archives named in `ARCHIVES`.
        name: what tables call the data set.
        **settings: those of `ImageFolder`.

    Raises:
        SettingError: neither the tree nor the archives are there, or an archive is damaged; all that `ImageFolder`
            raises. A tree with other than 1,000 classes is warned of and used.
    """

    def __init__(self, *, root: str, name: str | None = "imagenet", **settings: Any) -> None:
        require(bool(root), "root", root, "a folder with train/ and val/, or with the original archives")
        unpack(Path(os.path.abspath(os.path.expanduser(root))))
        super().__init__(root=root, name=name, **settings)
        if self.num_classes != CLASSES:
            log.warning("data.root=%r holds %d classes; ImageNet-1K has %s", root, self.num_classes, f"{CLASSES:,}")


def unpack(root: Path) -> None:
    """Make the missing ones of `train/` and `val/` from the archives; raises `SettingError` where that fails.

    Every process of a run may call this at once: the first takes a lock, and the others wait and find the work done.
    """
    if not _missing(root):
        return
    _check(root)
    try:
        with locked(root / ".unpack.lock", f"unpacks {root}"):
            for split in reversed(_missing(root)):  # the small one first: its archives may turn out damaged
                _unpack_split(root, split)
    except (OSError, RuntimeError, tarfile.TarError) as error:  # torchvision's RuntimeError: not the original archive
        reason = " ".join(str(error).split())
        raise SettingError(
            f"data.root={str(root)!r} could not be unpacked ({reason}): repair the cause and start again, "
            "or set data.root to a folder with train/ and val/"
        ) from error


def _missing(root: Path) -> list[str]:
    return [split for split in _NEEDS if not (root / split).is_dir()]


def _check(root: Path) -> None:
    """Raise `SettingError` unless all that unpacking needs is there: the training images alone take long."""
    if not root.is_dir():
        raise SettingError(
            f"data.root={str(root)!r} {'is not a folder' if root.exists() else 'does not exist'}: {_EXPECTED}"
        )
    splits = _missing(root)
    needed = dict.fromkeys(ARCHIVES[key] for split in splits for key in _NEEDS[split])
    if absent := [file for file in needed if not (root / file).is_file()]:
        folders = " and ".join(f"{split}/" for split in splits)
        raise SettingError(
            f"data.root={str(root)!r} lacks {folders}, and to unpack {'it' if len(splits) == 1 else 'them'} from "
            f"{', '.join(absent)}: {_EXPECTED}"
        )
    if "val" in splits and find_spec("scipy") is None:
        raise SettingError(
            f"data.root={str(root)!r}: scipy reads the classes in {ARCHIVES['devkit']} and is not installed; "
            "pip install scipy, or set data.root to a folder with train/ and val/"
        )


def _unpack_split(root: Path, split: str) -> None:
    part = root / f"{split}.part"
    if part.exists():
        log.info("removing %s, which an interrupted run left", part)
        shutil.rmtree(part)
    archive = root / ARCHIVES[split]
    log.info("checking and unpacking %s, %.1f GB", archive, archive.stat().st_size / 1e9)
    began = time.monotonic()
    parse: Callable[..., None] = parse_train_archive
    if split == "val":
        parse_devkit_archive(root)  # again each time, for meta.bin may be half written
        parse = parse_val_archive
    parse(root, folder=part.name)
    part.rename(root / split)
    log.info("unpacked %s in %.0f s", root / split, time.monotonic() - began)
