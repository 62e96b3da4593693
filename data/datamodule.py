"""What every image source has in common: sizes, loaders, and the names that the rest of the project reads."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from stl.errors import SettingError


def require(ok: bool, setting: str, value: Any, allowed: str) -> None:
    """Raise a `SettingError` that names `data.<setting>` unless `ok`."""
    if not ok:
        raise SettingError(f"data.{setting}={value!r} is not possible: set data.{setting} to {allowed}")


def at_least(value: Any, least: int) -> bool:
    """Whether `value` is an integer, and not below `least`."""
    return isinstance(value, int) and value >= least


class ImageDataModule(pl.LightningDataModule):
    """Base of every source. A subclass sets `name` and `num_classes` when constructed and implements
    `train_set` and `val_set`.

    Batches are (images, labels): float32 (B, 3, image_size, image_size), normalised, and int64 (B,).

    Args:
        image_size: side of the square images, in pixels.
        batch_size: images a training step (on each device).
        eval_batch_size: images an evaluation step; None means `batch_size`.
        num_workers: worker processes of each loader; 0 loads in the main process.
        pin_memory: copy batches to page-locked memory; has no effect without a GPU.

    Raises:
        SettingError: one of these is out of range.
    """

    name: str  # goes into summary.json as `dataset`
    num_classes: int

    loader_class: type[DataLoader] = DataLoader
    collate = staticmethod(default_collate)

    def __init__(
        self,
        *,
        image_size: int,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        require(at_least(image_size, 1), "image_size", image_size, "a positive number of pixels")
        require(at_least(batch_size, 1), "batch_size", batch_size, "a positive number of images")
        require(
            eval_batch_size is None or at_least(eval_batch_size, 1),
            "eval_batch_size",
            eval_batch_size,
            "a positive number of images, or null for batch_size",
        )
        require(at_least(num_workers, 0), "num_workers", num_workers, "0 (load in the main process) or more")
        self.image_size = image_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.train_data: Any = None  # Datasets, once `setup` has run
        self.val_data: Any = None

    def train_set(self) -> Dataset:
        """The training split, augmented; called once, by `setup`."""
        raise NotImplementedError

    def val_set(self) -> Dataset:
        """The held-out split, never augmented; called once, by `setup`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.train_data is None and stage in (None, "fit"):
            self.train_data = self.train_set()
        if self.val_data is None:
            self.val_data = self.val_set()

    def train_dataloader(self) -> DataLoader:
        full_batch = len(self.train_data) >= self.batch_size  # a set smaller than a batch is still trained on
        return self._loader(self.train_data, batch_size=self.batch_size, shuffle=True, drop_last=full_batch)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_data, batch_size=self.eval_batch_size)

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        return self.loader_class(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            collate_fn=self.collate,
            **options,
        )
