"""Images that stay in the memory of the device that trains: read once, then cut out and flipped there.

A small model on small images otherwise waits for its loader: what a GPU trains on in a second takes dozens of cores.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from data.datamodule import ImageDataModule, at_least, require
from stl.errors import SettingError

log = logging.getLogger(__name__)

Sample = tuple[str, int]  # path of an image, and its label


class ResidentDataModule(ImageDataModule):
    """Base of sources that fit into the device's memory, as uint8. A subclass implements `samples`.

    Args:
        margin: black border in pixels, out of which training images are cut at random; they are also flipped at random.
            None leaves them as they are.
        max_unreadable: how many unreadable images are skipped before the run stops.
        cache: folder for the images as they were read, so that the next run begins at once; None keeps none. They are
            read again where the list of files is another, not where a file has changed.
        num_workers: threads that read the images at the start; 0 reads in the main one.
        **loading: the further arguments of `ImageDataModule`.

    Raises:
        SettingError: one of these is out of range; while reading, if one unreadable image more than allowed is met.
    """

    collate = staticmethod(lambda batch: batch)  # a batch is taken as one, not image by image

    def __init__(
        self,
        *,
        margin: int | None = 4,
        max_unreadable: int = 10,
        cache: str | Path | None = None,
        num_workers: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=False, **loading)
        require(margin is None or at_least(margin, 0), "margin", margin, "0 or more pixels, or null")
        require(at_least(max_unreadable, 0), "max_unreadable", max_unreadable, "0 or more images")
        self.margin = margin
        self.max_unreadable = max_unreadable
        self.cache = None if cache is None else Path(cache).expanduser()
        self._unreadable = 0

    def samples(self, split: str) -> Sequence[Sample]:
        """What "train" or "val" holds."""
        raise NotImplementedError

    def train_set(self) -> Dataset:
        return ShiftedImages(*self._read("train"), self.margin)

    def val_set(self) -> Dataset:
        return ResidentImages(*self._read("val"))

    def seeded_train_data(self) -> Dataset:
        return self.train_data  # which takes its randomness from the seeds

    def _loader(self, dataset: Any, **options: Any) -> Any:
        return DataLoader(dataset, collate_fn=self.collate, generator=torch.Generator(), **options)

    def _read(self, split: str) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, image_size, image_size) and int64 (N,) on the device."""
        kept = self.cache and self.cache / f"{split}-{self.image_size}-{digest(self.samples(split))}.pt"
        found = kept and recall(kept)
        images, labels = found or self._decode(split)
        if kept and not found:
            keep((images, labels), kept)
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        return images.to(device), labels.to(device)

    def _decode(self, split: str) -> tuple[Tensor, Tensor]:
        samples = self.samples(split)
        log.info("reading %s images of %s/", f"{len(samples):,}", split)
        images = torch.empty(len(samples), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def read(i: int) -> bool:
            try:
                images[i] = read_image(samples[i][0], self.image_size)
            except (RuntimeError, OSError):
                return False
            return True

        readable = torch.tensor(list(in_threads(read, range(len(samples)), self.num_workers)), dtype=torch.bool)
        for i in (~readable).nonzero().flatten().tolist():
            self._skip(samples[i][0])
        if not readable.any():
            raise SettingError(f"data.root holds no readable image in {split}/; set data.root to another folder")
        return images[readable], torch.tensor([label for _, label in samples])[readable]

    def _skip(self, path: str) -> None:
        self._unreadable += 1
        if self._unreadable > self.max_unreadable:
            raise SettingError(
                f"data.max_unreadable={self.max_unreadable} unreadable images are skipped, and one more was met: "
                f"{path}; repair or remove the files, or set data.max_unreadable to a larger number"
            )
        log.warning("skipped an unreadable image (%d so far): %s", self._unreadable, path)


def digest(samples: Sequence[Sample]) -> str:
    """16 hexadecimal digits of a list of images."""
    lines = (f"{label} {path}\n" for path, label in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def recall(path: Path) -> tuple[Tensor, Tensor] | None:
    """What `keep` saved; None where there is nothing, or something damaged."""
    try:
        images, labels = torch.load(path, mmap=True, weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, OSError, ValueError, UnpicklingError) as error:
        log.warning("%s is damaged (%s); reading the images again", path, str(error).splitlines()[0])
        return None
    return images, labels


def keep(tensors: tuple[Tensor, Tensor], path: Path) -> None:
    """Save them, whole or not at all; a folder that cannot be written to is no error."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, temporary)
        temporary.replace(path)
    except OSError as error:
        log.warning("could not keep the images in %s (%s); the next run reads them again", path, error)
        with suppress(OSError):
            temporary.unlink()


def in_threads(function: Callable[[int], bool], numbers: Sequence[int], threads: int) -> list[bool]:
    """[function(n) for n in numbers], by this many threads."""
    if not threads:
        return [function(n) for n in numbers]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, numbers))


def read_image(path: str, size: int) -> Tensor:
    """uint8 (3, size, size); images of another size have their shorter side scaled to it and their centre cut out."""
    image = decode_image(path, ImageReadMode.RGB)
    if image.shape[1:] != (size, size):
        image = center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size])
    return image


class ResidentImages(Dataset):
    """uint8 images (N, 3, S, S) and labels (N,) on one device, taken a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """What a DataLoader calls for a whole batch."""
        chosen = torch.tensor(indices, device=self.labels.device)
        return self.images[chosen], self.labels[chosen]


class ShiftedImages(ResidentImages):
    """The same, asked for by (index, seed); the seed alone says how an image is cut out and flipped."""

    def __init__(self, images: Tensor, labels: Tensor, margin: int | None) -> None:
        super().__init__(images, labels)
        self.margin = margin

    def __getitems__(self, keys: list[Any]) -> tuple[Tensor, Tensor]:
        images, labels = super().__getitems__([index for index, _ in keys])
        if self.margin is not None:
            images = shift_and_flip(images, self.margin, torch.tensor([seed for _, seed in keys], device=images.device))
        return images, labels


def shift_and_flip(images: Tensor, margin: int, seeds: Tensor) -> Tensor:
    """Each image (B, C, S, S) moved by up to ±margin pixels both ways over black, and half of them mirrored.

    `seeds` (B,) are uniform 62-bit numbers, each of which makes its image's three choices.
    """
    span = 2 * margin + 1
    down, right, mirrored = seeds % span, seeds // span % span, seeds // span**2 % 2
    side = torch.arange(images.shape[-1], device=images.device)
    rows, columns = down[:, None] + side, right[:, None] + side
    columns = torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return F.pad(images, [margin] * 4)[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]
