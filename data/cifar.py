"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32×32."""

from http.client import HTTPException
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

from data.datamodule import ImageDataModule, require
from data.transforms import channel_statistics
from stl.errors import SettingError

_SOURCES = {10: datasets.CIFAR10, 100: datasets.CIFAR100}
# mean and standard deviation of each channel over the training split
_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class CIFAR(ImageDataModule):
    """CIFAR with 10 or 100 classes; the test split is the held-out one.

    Args:
        classes: 10 or 100.
        root: folder that holds, or will hold, `cifar-10-batches-py` or `cifar-100-python`.
        download: fetch the data if `root` lacks it.
        image_size: images are resized to it if it is not 32.
        augment: random crop out of a border of 4 pixels, and horizontal flip.
        **loading: the further arguments of `ImageDataModule`.

    Raises:
        SettingError: another number of classes; missing data; when they are opened: damaged, or not downloadable.
    """

    def __init__(
        self,
        *,
        classes: int = 10,
        root: str = "datasets",
        download: bool = False,
        image_size: int = 32,
        augment: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(image_size=image_size, **loading)
        require(classes in _SOURCES, "classes", classes, "10 or 100")
        self.name = f"cifar{classes}"
        self.num_classes = classes
        self.mean, self.std = channel_statistics(*_STATISTICS[classes])
        self.root = root
        self.download = download
        self.augment = augment
        if not download and not (Path(root) / _SOURCES[classes].base_folder).is_dir():
            raise self._missing()

    def prepare_data(self) -> None:
        self._open(train=True)  # one process downloads, before the others look

    def train_set(self) -> Dataset:
        return self._open(train=True)

    def val_set(self) -> Dataset:
        return self._open(train=False)

    def _open(self, train: bool) -> Dataset:
        source = _SOURCES[self.num_classes]
        try:
            return source(self.root, train=train, transform=self._transform(train), download=self.download)
        except (RuntimeError, OSError, HTTPException) as error:
            if self.download:
                reason = " ".join(str(error).split())
                advice = f"fetch {source.url} yourself, unpack it in data.root and set data.download=false"
                raise SettingError(
                    f"data.download=true failed for data.root={self.root!r} ({reason}): {advice}"
                ) from error
            raise self._missing() from error

    def _missing(self) -> SettingError:
        return SettingError(
            f"data.root={self.root!r} lacks an intact {_SOURCES[self.num_classes].base_folder}/: "
            "set data.root to the folder that holds it, or data.download=true to fetch it"
        )

    def _transform(self, train: bool) -> v2.Transform:
        steps: list[Any] = [v2.PILToTensor()]
        if train and self.augment:
            steps += [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        if self.image_size != 32:
            steps.append(v2.Resize(self.image_size, InterpolationMode.BICUBIC))
        return v2.Compose(steps)
