"""1,797 real handwritten digits that come inside scikit-learn: nothing to download, an epoch takes seconds."""

from functools import cached_property
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from data.datamodule import ImageDataModule


class Digits(ImageDataModule):
    """The 8×8 digits, enlarged to `image_size`, grey as three equal channels; 1,437 to train on, 360 held out.

    Args:
        image_size: side of the enlarged images, in pixels.
        augment: turn (±10°), shift (±10 %) and scale (±10 %) the training images at random.
        split_seed: picks the held-out images, stratified by class; independent of the training seed.
        **loading: the further arguments of `ImageDataModule`.
    """

    name = "digits"
    num_classes = 10

    def __init__(self, *, image_size: int = 32, augment: bool = True, split_seed: int = 0, **loading: Any) -> None:
        super().__init__(image_size=image_size, **loading)
        self.augment = augment
        self.split_seed = split_seed

    @cached_property
    def _splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Images in 0…1, (1437 or 360, 1, s, s), and labels of "train" and "val"."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # 17 grey levels
        size = (self.image_size, self.image_size)
        images = interpolate(images, size=size, mode="bicubic", align_corners=False).clamp(0, 1)  # bicubic overshoots
        labels = torch.from_numpy(digits.target).long()
        train, val = train_test_split(
            range(len(labels)), test_size=0.2, stratify=digits.target, random_state=self.split_seed
        )
        return {"train": (images[train], labels[train]), "val": (images[val], labels[val])}

    def train_set(self) -> Dataset:
        # before normalisation, where the paper is 0 like the fill: torchvision blends any other fill wrongly at the rim
        affine = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        steps = [affine] if self.augment else []
        return _TensorImages(*self._splits["train"], v2.Compose([*steps, self._normalise()]))

    def val_set(self) -> Dataset:
        return _TensorImages(*self._splits["val"], self._normalise())

    def _normalise(self) -> v2.Normalize:
        std, mean = torch.std_mean(self._splits["train"][0])
        return v2.Normalize([mean.item()], [std.item()])


class _TensorImages(Dataset):
    """Grey images (N, 1, s, s) in memory; an item is (3, s, s), transformed, and its label."""

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]).expand(3, -1, -1), self.labels[index]
