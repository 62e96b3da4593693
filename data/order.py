"""The order of the training images, and the randomness of each, as functions of the seed and the epoch alone.

So an epoch is entered anywhere, by any number of workers and devices, and goes on as if it had never stopped.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import Dataset, Sampler


def derived_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers that are not negative."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's CPU randomness start from `seed` inside and go on as before afterwards."""
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's transforms draw from it
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's as well
        yield


class EpochOrder(Sampler[tuple[int, int]]):
    """One device's share of each epoch's permutation: (index, seed of the augmentation) of every image.

    Of D devices the d-th takes every D-th image of the permutation from the d-th on, so that the images of a step are
    the same for every D. Images that fill no whole batch are left out of the epoch, other ones each time.

    Args:
        length: images in the training set.
        batch_size: images of an optimizer step, over all devices; more than `length` makes one smaller batch.
        seed: of the permutations and augmentations.
        device, devices: which share this is.
        epoch, skip: where to begin: images of this device's share of that epoch that were taken already.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, device: int, devices: int, epoch: int = 0, skip: int = 0
    ) -> None:
        whole = length - length % (batch_size if length >= batch_size else devices)
        self.length, self.share = length, whole // devices
        self.seed, self.device, self.devices = seed, device, devices
        self.epoch, self._begin = epoch, (epoch, skip)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        seeds = torch.randint(2**62, (self.length,), generator=generator)
        began, skip = self._begin
        mine = order[self.device :: self.devices][skip if self.epoch == began else 0 : self.share]
        yield from zip(mine.tolist(), seeds[mine].tolist(), strict=True)


class SeededItems(Dataset):
    """A map-style data set whose items are asked for by (index, seed)."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with seeded(seed):
            return self.source[index]
