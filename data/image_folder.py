"""Any tree of images with one folder per class, ImageNet's among them."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets

from data.datamodule import ImageDataModule, at_least, require
from data.transforms import channel_statistics, eval_transform, train_transform
from stl.errors import SettingError

log = logging.getLogger(__name__)

_TREE = "expected <root>/train/<class>/*.jpg and <root>/val/<class>/*.jpg"


class Unreadable:
    """Counts the distinct images that could not be read, over splits, epochs and worker processes.

    Workers only set the image's flag, in memory they share with the main process under fork as under spawn. The main
    process logs and raises: an exception out of a worker would arrive as a page of traceback.
    """

    def __init__(self, folders: Sequence["_Folder"], limit: int) -> None:
        self.limit = limit
        self.paths = [path for folder in folders for path, _ in folder.samples]
        self.flags = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()
        self._logged: set[int] = set()
        for folder, flags in zip(folders, self.flags.split([len(folder) for folder in folders]), strict=True):
            folder.unreadable, folder.flags = self, flags

    def check(self) -> None:
        """Log the images flagged since the last call; raise `SettingError` if the limit is exceeded."""
        new = [i for i in self.flags.nonzero().flatten().tolist() if i not in self._logged]
        for i in new:
            self._logged.add(i)
            if len(self._logged) > self.limit:
                raise SettingError(
                    f"data.max_unreadable={self.limit} unreadable images are skipped, and one more was met: "
                    f"{self.paths[i]}; repair or remove the files, or set data.max_unreadable to a larger number"
                )
            log.warning("skipped an unreadable image (%d so far): %s", len(self._logged), self.paths[i])


class _Folder(datasets.ImageFolder):
    """torchvision's, except that an item is None, and flagged, if the image cannot be read."""

    unreadable: Unreadable
    flags: Tensor  # (N,) uint8

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        try:
            image = self.loader(path)
        except Exception:  # a broken file raises OSError, SyntaxError, ValueError, struct.error …
            self.flags[index] = 1
            return None
        assert self.transform is not None
        return self.transform(image), label


class _SkippingLoader(DataLoader):
    """Yields what was readable of each batch, after checking the count."""

    def __init__(self, *args: Any, unreadable: Unreadable, **options: Any) -> None:
        super().__init__(*args, **options)
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                self.unreadable.check()
                if batch is None:
                    raise SettingError(
                        f"data: a batch of {self.batch_size} holds no readable image; repair or remove "
                        "the files named in the log, or set data.batch_size or data.eval_batch_size higher"
                    )
                yield batch
        except SettingError:
            self._iterator = None  # ends the workers now; the traceback would keep them until they have to be killed
            raise


def _collate_readable(items: list[Any]) -> Any:
    readable = [item for item in items if item is not None]
    return default_collate(readable) if readable else None


def open_tree(root: Path) -> tuple[_Folder, _Folder]:
    """Both splits, without transforms; raises `SettingError` if the tree is not as expected."""

    def wrong(what: str) -> SettingError:
        return SettingError(f"data.root={str(root)!r} {what}: {_TREE}; repair the tree or set data.root to another")

    if not root.is_dir():
        raise wrong("is not a folder" if root.exists() else "does not exist")
    if not any(root.iterdir()):
        raise wrong("is empty")
    splits = ("train", "val")
    if missing := [f"{split}/" for split in splits if not (root / split).is_dir()]:
        raise wrong(f"lacks {' and '.join(missing)}")
    train, val = ({entry.name for entry in os.scandir(root / split) if entry.is_dir()} for split in splits)
    if train != val:
        raise wrong(
            "has different classes in its splits "
            f"(only in train/: {_first(train - val)}; only in val/: {_first(val - train)})"
        )
    if not train:
        raise wrong("has no class folders in train/ and val/")
    folders = _Folder(str(root / "train"), allow_empty=True), _Folder(str(root / "val"), allow_empty=True)
    for split, folder in zip(splits, folders, strict=True):
        filled = set(folder.targets)
        if empty := {name for name, label in folder.class_to_idx.items() if label not in filled}:
            raise wrong(f"has class folders without an image in {split}/ ({_first(empty)})")
    return folders


def _first(names: set[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(sorted(names)[:most]) or "none") + rest


class ImageFolder(ImageDataModule):
    """`<root>/train/<class>/*` and `<root>/val/<class>/*`; the sorted folder names are the classes.

    An unreadable image is skipped: its batch is smaller by one, its path is logged once, and it counts once however
    many epochs meet it. The count covers both splits and all worker processes of this training process.

    Args:
        root: folder with `train/` and `val/`.
        name: what tables call the data set; None means the root folder's name.
        image_size: side of the images, in pixels.
        scale, auto_augment, interpolation, crop_pct, mean, std: see `data.transforms`.
        max_unreadable: how many unreadable images are skipped before the run stops.
        **loading: the further arguments of `ImageDataModule`.

    Raises:
        SettingError: at construction, if a setting or the tree is wrong; while loading, if one unreadable image
            more than allowed is met, or a batch has no readable image.
    """

    loader_class = _SkippingLoader
    collate = staticmethod(_collate_readable)

    def __init__(
        self,
        *,
        root: str,
        name: str | None = None,
        image_size: int = 224,
        scale: Sequence[float] = (0.08, 1.0),
        auto_augment: str | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 0.9,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        max_unreadable: int = 10,
        **loading: Any,
    ) -> None:
        super().__init__(image_size=image_size, **loading)
        require(bool(root), "root", root, "a folder with train/ and val/")
        require(at_least(max_unreadable, 0), "max_unreadable", max_unreadable, "0 or more images")
        self.mean, self.std = channel_statistics(mean, std)
        augmented = train_transform(
            image_size, scale=scale, auto_augment=auto_augment, interpolation=interpolation, mean=mean
        )
        plain = eval_transform(image_size, crop_pct=crop_pct)
        path = Path(os.path.abspath(os.path.expanduser(root)))
        self._train, self._val = open_tree(path)
        self._train.transform, self._val.transform = augmented, plain
        self.unreadable = Unreadable([self._train, self._val], max_unreadable)
        self.name = name or path.name
        self.num_classes = len(self._train.classes)

    def train_set(self) -> Dataset:
        return self._train

    def val_set(self) -> Dataset:
        return self._val

    def _loader(self, dataset: Any, **options: Any) -> Any:
        return super()._loader(dataset, unreadable=self.unreadable, **options)
