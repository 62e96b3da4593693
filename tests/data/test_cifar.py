"""torchvision's own loading code runs on a tree of a few images in CIFAR's format, its checksums included."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from delivery import delivered
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchvision import datasets

from data.cifar import CIFAR
from stl.errors import SettingError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
SOURCES = {10: (datasets.CIFAR10, "labels"), 100: (datasets.CIFAR100, "fine_labels")}


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar(classes) → root of a tree with 6 images a file, label 0…5."""

    def build(classes: int) -> Path:
        source, key = SOURCES[classes]
        folder = tmp_path / source.base_folder
        folder.mkdir()

        def dump(name: str, content: dict) -> str:
            payload = pickle.dumps(content)
            (folder / name).write_bytes(payload)
            return hashlib.md5(payload).hexdigest()

        pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
        for split in ("train_list", "test_list"):
            names = [name for name, _ in getattr(source, split)]
            sums = [[name, dump(name, {"data": pixels, key: list(range(6))})] for name in names]
            monkeypatch.setattr(source, split, sums)
        meta = {**source.meta, "md5": dump(source.meta["filename"], {source.meta["key"]: ["a"] * classes})}
        monkeypatch.setattr(source, "meta", meta)
        return tmp_path

    return build


@pytest.mark.parametrize(("classes", "files"), [(10, 5), (100, 1)])
def test_the_yaml_gives_batches_of_the_promised_form(cifar, classes, files):
    config = OmegaConf.load(CONFIGS / f"cifar{classes}.yaml")
    source = instantiate(config, root=str(cifar(classes)), batch_size=4, num_workers=0)
    assert (source.name, source.num_classes, source.image_size) == (f"cifar{classes}", classes, 32)
    source.prepare_data()
    source.setup()
    assert len(source.train_data) == 6 * files
    images, labels = delivered(source)["train"][0]
    assert images.shape == (4, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert [labels.tolist() for _, labels in source.val_dataloader()] == [[0, 1, 2, 3], [4, 5]]


def test_augments_training_only_and_normalises(cifar):
    source = CIFAR(classes=10, root=str(cifar(10)))
    source.setup()
    torch.manual_seed(0)
    assert not torch.equal(source.train_data[0][0], source.train_data[0][0])
    assert torch.equal(source.val_data[0][0], source.val_data[0][0])
    image = delivered(source)["val"][0][0][0]
    pixels = torch.from_numpy(source.val_data.data[0]).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    assert torch.allclose(image, (pixels - mean[:, None, None]) / std[:, None, None], atol=1e-5)


def test_augmentation_can_be_switched_off(cifar):
    source = CIFAR(classes=10, root=str(cifar(10)), augment=False)
    source.setup()
    assert torch.equal(source.train_data[0][0], source.val_data[0][0])  # the same pixels in the fake tree


def test_resizes(cifar):
    source = CIFAR(classes=10, root=str(cifar(10)), image_size=48)
    source.setup()
    assert source.train_data[0][0].shape == source.val_data[0][0].shape == (3, 48, 48)


def test_another_number_of_classes():
    with pytest.raises(SettingError) as caught:
        CIFAR(classes=20)
    assert str(caught.value) == "data.classes=20 is not possible: set data.classes to 10 or 100"


def missing(root) -> str:
    return (
        f"data.root={str(root)!r} lacks an intact cifar-10-batches-py/: "
        "set data.root to the folder that holds it, or data.download=true to fetch it"
    )


def test_missing(tmp_path):
    with pytest.raises(SettingError) as caught:
        CIFAR(classes=10, root=str(tmp_path))  # before a run writes anything
    assert str(caught.value) == missing(tmp_path)


def test_damaged(cifar):
    root = cifar(10)
    file = root / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SettingError) as caught:
        CIFAR(classes=10, root=str(root)).setup()
    assert str(caught.value) == missing(root)


def test_failing_download(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(SettingError) as caught:
        CIFAR(classes=100, root=str(tmp_path), download=True).prepare_data()
    assert str(caught.value) == (
        f"data.download=true failed for data.root={str(tmp_path)!r} (no route to host): "
        "fetch https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz yourself, "
        "unpack it in data.root and set data.download=false"
    )
