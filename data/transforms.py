"""What happens to a photograph before the model sees it: timm's random crops in training, its centre crop otherwise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from data.datamodule import require

Transform = Callable[[Any], Any]  # PIL image -> uint8 (3, image_size, image_size)


def channel_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, for images in 0…1, as `ImageDataModule` takes them: (3, 1, 1).

    Raises:
        SettingError: one of these is out of range.
    """
    require(len(mean) == 3, "mean", list(mean), "three numbers")
    require(len(std) == 3 and min(std) > 0, "std", list(std), "three positive numbers")
    return torch.tensor([*mean]).view(3, 1, 1), torch.tensor([*std]).view(3, 1, 1)


def train_transform(
    image_size: int,
    *,
    scale: Sequence[float],
    auto_augment: str | None,
    interpolation: str,
    mean: Sequence[float],
) -> Transform:
    """A random crop and flip, and an augmentation policy where one is named.

    Args:
        image_size: side of the images, in pixels.
        scale: smallest and largest part of an image's area that a crop takes.
        auto_augment: timm's name of a policy, as "rand-m9-mstd0.5-inc1"; None has none.
        interpolation: "bilinear", "bicubic", or "random" for either.
        mean: of each channel, for images in 0…1; the policy fills with it what an operation leaves empty.

    Raises:
        SettingError: one of these is out of range.
    """
    low, high = scale if len(scale) == 2 else (0.0, 0.0)
    require(0 < low <= high <= 1, "scale", list(scale), "two numbers with 0 < smallest <= largest <= 1")
    choices = ("bilinear", "bicubic", "random")
    require(interpolation in choices, "interpolation", interpolation, f"one of {', '.join(choices)}")
    return create_transform(
        input_size=image_size,
        is_training=True,
        scale=(low, high),
        color_jitter=0.0,
        auto_augment=auto_augment,
        interpolation=interpolation,
        mean=tuple(mean),
        normalize=False,
    )


def eval_transform(image_size: int, *, crop_pct: float) -> Transform:
    """The shorter side to `image_size / crop_pct`, bicubic, then the centre; never random.

    Raises:
        SettingError: one of these is out of range.
    """
    require(0 < crop_pct <= 1, "crop_pct", crop_pct, "a number in (0, 1]")
    return create_transform(image_size, interpolation="bicubic", crop_pct=crop_pct, normalize=False)
