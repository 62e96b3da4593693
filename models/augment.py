"""Augmentation of whole batches, on the device where they are: mixup or cutmix, then random erasing."""

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class BatchAugment:
    """(images, labels) → (images, soft targets): timm's Mixup, then timm's RandomErasing, the order of timm's loader.

    Args:
        mixup, cutmix: α of the Beta distributions (Zhang et al., 2018; Yun et al., 2019); 0 switches one off.
        switch: probability of cutmix where both are on.
        label_smoothing: of the soft targets.
        erasing: probability that an image loses a rectangle to noise (Zhong et al., 2020).
        num_classes: length of a soft target.

    Images (B, 3, H, W) float, labels (B,) int64; the targets are (B, num_classes). Mixup pairs images, so an odd batch
    loses its last one.
    """

    def __init__(
        self, *, mixup: float, cutmix: float, switch: float, label_smoothing: float, erasing: float, num_classes: int
    ) -> None:
        self.mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            switch_prob=switch,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self.erasing = erasing

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) - len(images) % 2
        images, targets = self.mixup(images[:even].clone(), labels[:even])
        erase = RandomErasing(probability=self.erasing, mode="pixel", device=images.device)
        return erase(images), targets
