"""Images on the device: what they are, how they are shifted, and what a tree that is not right gets."""

from pathlib import Path

import pytest
import torch
from delivery import delivered
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from data.resident import shift_and_flip
from data.tiny_imagenet import ANNOTATIONS, TinyImageNet
from stl.errors import SettingError

CONFIG = Path(__file__).parents[2] / "configs" / "data" / "tiny_imagenet.yaml"
NAMES = ("n01", "n02", "n03")


@pytest.fixture
def tree(tmp_path) -> Path:
    """As the archive unpacks: 4 training and 2 validation images of each of 3 classes, all of class c 40c grey."""
    for label, name in enumerate(NAMES):
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{name}_boxes.txt").write_text("0\t0\t62\t62\n")
        for i in range(4):
            Image.new("L", (64, 64), 40 * label + i).save(folder / f"{i}.JPEG")
    images = tmp_path / "val" / "images"
    images.mkdir(parents=True)
    lines = []
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * (i % 3),) * 3).save(images / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{NAMES[i % 3]}\t0\t0\t62\t62\n")
    (tmp_path / "val" / ANNOTATIONS).write_text("".join(lines))
    return tmp_path


def test_the_yaml_gives_batches_of_the_promised_form(tree):
    source = instantiate(
        OmegaConf.load(CONFIG), root=str(tree), batch_size=4, eval_batch_size=4, num_workers=2, margin=0
    )
    assert (source.name, source.num_classes, source.image_size) == ("tiny_imagenet", 3, 64)
    batches = delivered(source)
    assert [len(labels) for _, labels in batches["train"]] == [4, 4, 4]
    assert [labels.tolist() for _, labels in batches["val"]] == [[0, 1, 2, 0], [1, 2]]
    images = torch.cat([images for images, _ in batches["train"]])
    labels = torch.cat([labels for _, labels in batches["train"]])
    assert images.shape == (12, 3, 64, 64)
    grey = (images * source.std + source.mean).mean((1, 2, 3)) * 255
    assert (grey / 40).round().long().tolist() == labels.tolist()
    assert labels.bincount().tolist() == [4, 4, 4]


def test_a_tree_of_class_folders_is_the_same_data(tree):
    official = TinyImageNet(root=str(tree), batch_size=6, margin=None)
    official.setup()
    for i in range(6):
        folder = tree / "val" / NAMES[i % 3]
        folder.mkdir(exist_ok=True)
        (tree / "val" / "images" / f"val_{i}.JPEG").rename(folder / f"val_{i}.JPEG")
    (tree / "val" / "images").rmdir()
    (tree / "val" / ANNOTATIONS).unlink()
    folders = TinyImageNet(root=str(tree), batch_size=6, margin=None)
    folders.setup()
    assert torch.equal(official.train_data.images, folders.train_data.images)
    assert folders.val_data.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_seed_alone_says_how_an_image_is_cut(tree):
    def epoch(seed: int) -> torch.Tensor:
        source = TinyImageNet(root=str(tree), batch_size=12, margin=8, seed=seed)
        source.setup()
        return next(iter(source.train_dataloader()))[0]

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**62 - 1))
def test_shifting_keeps_the_picture(margin, size, seed):
    image = torch.arange(1, 1 + 3 * size**2, dtype=torch.uint8).view(1, 3, size, size)
    moved = shift_and_flip(image, margin, torch.tensor([seed]))
    assert moved.shape == image.shape
    border = torch.nn.functional.pad(image, [margin] * 4)
    crops = [border[:, :, i : i + size, j : j + size] for i in range(2 * margin + 1) for j in range(2 * margin + 1)]
    assert any(torch.equal(moved, crop) or torch.equal(moved, crop.flip(3)) for crop in crops)


def test_all_shifts_are_about_as_frequent():
    images = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 1
    seeds = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(0))
    places = shift_and_flip(images, 2, seeds).flatten(1).argmax(1).bincount(minlength=25)
    assert places.min() > 100  # 160 on average
    assert places.max() < 220


def test_an_unreadable_image_is_skipped_up_to_the_limit(tree):
    broken = tree / "train" / "n02" / "images" / "1.JPEG"
    broken.write_bytes(b"no image")
    source = TinyImageNet(root=str(tree), max_unreadable=1)
    source.setup()
    assert source.train_data.labels.bincount().tolist() == [4, 3, 4]
    with pytest.raises(SettingError, match=f"max_unreadable=0 unreadable .* {broken}"):
        TinyImageNet(root=str(tree), max_unreadable=0).setup()


def test_images_are_read_once_where_they_are_kept(tree, monkeypatch, caplog):
    def images() -> torch.Tensor:
        source = TinyImageNet(root=str(tree), cache=str(tree / "kept"))
        source.setup()
        return source.train_data.images

    first = images()
    with monkeypatch.context() as context:
        context.setattr("data.resident.read_image", None)
        assert torch.equal(images(), first)
    for kept in (tree / "kept").glob("train*"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(images(), first)
    assert "is damaged" in caplog.text
    (tree / "train" / "n02" / "images" / "1.JPEG").unlink()
    assert len(images()) == len(first) - 1
    source = TinyImageNet(root=str(tree), cache=str(tree / "val" / ANNOTATIONS / "no folder"))
    source.setup()
    assert len(source.train_data) == len(first) - 1
    assert "could not keep the images" in caplog.text


def test_images_of_another_size_are_scaled_and_cut(tree):
    source = TinyImageNet(root=str(tree), image_size=32)
    source.setup()
    assert source.val_data.images.shape == (6, 3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "nowhere"}, "does not exist"),
        ({"margin": -1}, "margin"),
        ({"max_unreadable": -1}, "max_unreadable"),
    ],
)
def test_bad_settings_are_named(tree, settings, message):
    with pytest.raises(SettingError, match=message):
        TinyImageNet(**({"root": str(tree)} | settings))


def test_annotations_of_a_missing_image_are_named(tree):
    (tree / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(SettingError, match=r"val_3\.JPEG"):
        TinyImageNet(root=str(tree))
    (tree / "train").rename(tree / "elsewhere")
    with pytest.raises(SettingError, match="train"):
        TinyImageNet(root=str(tree))


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("data.tiny_imagenet.download_and_extract_archive", fail)
    with pytest.raises(SettingError, match=r"download=true failed .*no route to host.*fetch http"):
        TinyImageNet(root=str(tmp_path / "new"), download=True)
