"""Tiny-ImageNet-200 (Stanford CS231n): 100,000 training and 10,000 validation images of 64×64 in 200 classes."""

import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder
from torchvision.datasets.utils import download_and_extract_archive

from data.image_folder import open_tree
from data.resident import ResidentDataModule, Sample
from data.transforms import channel_statistics
from stl.errors import SettingError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"  # in the archive
ANNOTATIONS = "val_annotations.txt"  # beside val/images/: file name, class, box
# mean and standard deviation of each channel over the training split
_STATISTICS = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)


class TinyImageNet(ResidentDataModule):
    """The validation split, whose labels are public, is the held-out one; the sorted WordNet ids are the classes.

    Args:
        root: folder as unpacked, with train/<class>/images/ and val/val_annotations.txt; or with train/<class>/ and
            val/<class>/.
        download: fetch and unpack it where `root` does not exist.
        image_size: images are resized to it if it is not 64.
        **settings: those of `ResidentDataModule`.

    Raises:
        SettingError: `root` is not as expected, or what was to be fetched cannot be.
    """

    name = "tiny_imagenet"

    def __init__(
        self,
        *,
        root: str = f"datasets/{FOLDER}",
        download: bool = False,
        image_size: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(image_size=image_size, **settings)
        self.mean, self.std = channel_statistics(*_STATISTICS)
        path = Path(os.path.abspath(os.path.expanduser(root)))
        if download and not path.exists():
            fetch(path)
        self._samples, self.num_classes = list_images(path)

    def samples(self, split: str) -> Sequence[Sample]:
        return self._samples[split]


def fetch(root: Path) -> None:
    """Download and unpack the archive, whose one folder becomes `root`; raises SettingError where that fails."""
    part = root.with_name(f"{root.name}.part")
    try:
        download_and_extract_archive(URL, str(part), md5=MD5, remove_finished=True)
        (part / FOLDER).rename(root)
        part.rmdir()
    except (RuntimeError, OSError, HTTPException) as error:
        raise SettingError(
            f"data.download=true failed for data.root={str(root)!r} ({' '.join(str(error).split())}): fetch {URL} "
            "yourself, unpack it in data.root and set data.download=false"
        ) from error


def list_images(root: Path) -> tuple[dict[str, Sequence[Sample]], int]:
    """The images of both splits with their labels, and the number of classes; raises SettingError if a file that the
    annotations name is not there, or the tree is not as expected."""
    annotations = root / "val" / ANNOTATIONS
    if not annotations.is_file():
        train, val = open_tree(root)
        return {"train": train.samples, "val": val.samples}, len(train.classes)
    try:
        folder = ImageFolder(str(root / "train"))
    except OSError as error:
        raise SettingError(f"data.root={str(root)!r}: {error}; unpack {URL} again") from error
    val_samples = []
    for line in filter(str.strip, annotations.read_text().splitlines()):
        file, name, *_ = line.split("\t")
        path = annotations.parent / "images" / file
        if name not in folder.class_to_idx or not path.is_file():
            raise SettingError(
                f"{annotations} names {file} of class {name}, which val/images/ or train/ lacks; unpack {URL} again"
            )
        val_samples.append((str(path), folder.class_to_idx[name]))
    return {"train": folder.samples, "val": val_samples}, len(folder.classes)
