"""What every source has in common: the batches of a step, loaders, and the place in an epoch; and what images add."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.order import EpochOrder, SeededItems
from stl.errors import SettingError


def require(ok: bool, setting: str, value: Any, allowed: str) -> None:
    """Raise a `SettingError` that names `data.<setting>` unless `ok`."""
    if not ok:
        raise SettingError(f"data.{setting}={value!r} is not possible: set data.{setting} to {allowed}")


def at_least(value: Any, least: int) -> bool:
    """Whether `value` is an integer, and not below `least`."""
    return isinstance(value, int) and value >= least


class BatchDataModule(pl.LightningDataModule):
    """Base of every source. A subclass sets `name` when constructed and implements `train_set` and `val_set`.

    Args:
        batch_size: samples an optimizer step, over all devices together.
        device_batch_size: samples that a device takes at a time; a step accumulates as many such batches as it needs.
            None means that each device takes its whole share of `batch_size` at once.
        eval_batch_size: samples an evaluation step, on each device; None means as in training.
        num_workers: worker processes of each loader; 0 loads in the main process.
        pin_memory: copy batches to page-locked memory; has no effect without a GPU.
        seed: of the order and the augmentation of the training samples.

    Checkpoints carry the position in the epoch: a run that goes on takes the samples that it would have taken.

    Raises:
        SettingError: one of these is out of range.
    """

    name: str  # goes into summary.json as `dataset`
    unit = "samples"  # what messages call them
    input_shape: tuple[int, ...]  # of a sample as the model takes it
    input_dtype = torch.float32
    vocabulary: str | None = None  # of token ids; see `data.tokenizer.Tokenizer`

    loader_class: type[DataLoader] = DataLoader
    collate = staticmethod(default_collate)

    def __init__(
        self,
        *,
        batch_size: int = 128,
        device_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(at_least(batch_size, 1), "batch_size", batch_size, f"a positive number of {self.unit}")
        for name, value in (("device_batch_size", device_batch_size), ("eval_batch_size", eval_batch_size)):
            require(value is None or at_least(value, 1), name, value, f"a positive number of {self.unit}, or null")
        require(at_least(num_workers, 0), "num_workers", num_workers, "0 (load in the main process) or more")
        self.batch_size = batch_size
        self.device_batch_size = device_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self._position = {"epoch": 0, "batches": 0}
        self.train_data: Any = None  # Datasets, once `setup` has run
        self.val_data: Any = None

    @property
    def for_model(self) -> dict[str, Any]:
        """What building a model needs to know."""
        raise NotImplementedError

    def train_set(self) -> Dataset:
        """The training split, augmented; called once, by `setup`."""
        raise NotImplementedError

    def val_set(self) -> Dataset:
        """The held-out split, never augmented; called once, by `setup`."""
        raise NotImplementedError

    def seeded_train_data(self) -> Dataset:
        """The training split, asked for by (index, seed)."""
        return SeededItems(self.train_data)

    def keep(self, folder: Path) -> None:
        """Put there what is needed beside a checkpoint; nothing, and no folder, unless a subclass has something."""

    def setup(self, stage: str | None = None) -> None:
        if self.train_data is None and stage in (None, "fit"):
            self.train_data = self.train_set()
        if self.val_data is None:
            self.val_data = self.val_set()

    def split(self, devices: int) -> tuple[int, int]:
        """(samples that each of `devices` takes at a time, batches that a step accumulates); their product times
        `devices` is `batch_size`. Raises `SettingError` where there is no such split."""
        share = self.device_batch_size or max(1, self.batch_size // devices)
        steps, rest = divmod(self.batch_size, share * devices)
        if rest or not steps:
            raise SettingError(
                f"data.batch_size={self.batch_size} does not split over {devices} device{'s' * (devices > 1)} with "
                f"data.device_batch_size={self.device_batch_size}: it must be a multiple of {share} × {devices} = "
                f"{share * devices}; change trainer.devices or one of the two"
            )
        return share, steps

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, for a checkpoint that is written between two optimizer steps."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        under_way = epochs.processed == epochs.completed  # else an epoch is at its end
        batches = loop.epoch_loop.batch_progress.current.ready if under_way else 0
        return {"epoch": epochs.processed, "batches": batches, **self._reading()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `SettingError` where the middle of an epoch was reached in another division of the samples."""
        if state_dict["batches"] and (
            changed := [
                f"{key} was {state_dict.get(key)}, is {now}"
                for key, now in self._reading().items()
                if state_dict.get(key) != now
            ]
        ):
            raise SettingError(
                f"the checkpoint stands in the middle of epoch {state_dict['epoch']}, and its {self.unit} are divided "
                f"otherwise now: {'; '.join(changed)}; make them agree, or go on from a checkpoint of a whole epoch"
            )
        self._position = {key: state_dict[key] for key in ("epoch", "batches")}

    def _reading(self) -> dict[str, Any]:
        """What the meaning of a position in the middle of an epoch depends on."""
        assert self.trainer is not None
        devices = self.trainer.world_size
        return {
            "the source": type(self).__qualname__,
            "trainer.devices": devices,
            "the batch of a device": self.split(devices)[0],
            "data.batch_size": self.batch_size,
        }

    def train_dataloader(self) -> Any:
        device, devices = self._place()
        share, _ = self.split(devices)
        order = EpochOrder(
            len(self.train_data),
            self.batch_size,
            seed=self.seed,
            device=device,
            devices=devices,
            epoch=self._position["epoch"],
            skip=self._position["batches"] * share,
        )
        return self._loader(self.seeded_train_data(), batch_size=share, sampler=order)

    def val_dataloader(self) -> Any:
        device, devices = self._place()
        self._check_enough(self.val_data, "validation", devices)
        batch_size = self.eval_batch_size or self.split(devices)[0]
        if devices == 1:
            return self._loader(self.val_data, batch_size=batch_size)
        sampler = UnrepeatedDistributedSampler(self.val_data, devices, device, shuffle=False)
        fewest, most = len(self.val_data) // devices, math.ceil(len(self.val_data) / devices)  # samples of a device
        while math.ceil(fewest / batch_size) < math.ceil(most / batch_size):
            batch_size += 1  # a device with one batch more would wait in it for the others
        return self._loader(self.val_data, batch_size=batch_size, sampler=sampler)

    def _check_enough(self, dataset: Any, kind: str, devices: int) -> None:
        """Raise `SettingError` where a device would have nothing of it."""
        if len(dataset) < devices:
            raise SettingError(
                f"trainer.devices={devices} are more than the {len(dataset)} {kind} {self.unit}, of which each "
                "takes one at least; set it lower, or give more data"
            )

    def _place(self) -> tuple[int, int]:
        """This process's number, and how many train together."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: Any, **options: Any) -> Any:
        return self.loader_class(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            collate_fn=self.collate,
            generator=torch.Generator(),  # PyTorch's own would move each time that a loader is started
            **options,
        )


class ImageDataModule(BatchDataModule):
    """Base of every source of images. A subclass sets `name` and `num_classes` when constructed and implements
    `train_set` and `val_set`.

    Batches are (images, labels): float32 (B, 3, image_size, image_size), normalised, and int64 (B,). Where a source
    sets `mean` and `std`, its loaders give uint8 in 0…255, a quarter of the bytes, and the device normalises.

    Args:
        image_size: side of the square images, in pixels.
        **loading: the further arguments of `BatchDataModule`.

    Raises:
        SettingError: one of these is out of range.
    """

    num_classes: int
    mean: Tensor  # (3, 1, 1), of each channel, for images in 0…1
    std: Tensor
    unit = "images"

    def __init__(self, *, image_size: int, **loading: Any) -> None:
        super().__init__(**loading)
        require(at_least(image_size, 1), "image_size", image_size, "a positive number of pixels")
        self.image_size = image_size
        self.input_shape = (3, image_size, image_size)

    @property
    def for_model(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "img_size": self.image_size}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises uint8 images; the trainer calls this when the batch is on the device."""
        images, labels = batch
        if images.dtype == torch.uint8:
            assert self.trainer is not None
            # what the trainer does to floating-point batches, too early for these
            images = self.trainer.precision_plugin.convert_input(self.normalise(images))
        return images, labels

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) in 0…255 → float32, scaled to 0…1, less `mean`, divided by `std`."""
        # Kept there: a copy in every step would make the CPU wait for the GPU.
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().div_(255).sub_(self.mean).div_(self.std)
