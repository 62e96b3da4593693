import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import timm.data
import torch
from delivery import delivered
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

import models.t2t_vit  # noqa: F401  registers the published models
from data.image_folder import ImageFolder
from data.order import seeded
from stl.errors import SettingError

YAML = Path(__file__).parents[2] / "configs" / "data" / "image_folder.yaml"
TREE = "expected <root>/train/<class>/*.jpg and <root>/val/<class>/*.jpg; repair the tree or set data.root to another"


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes; 6 training and 3 validation images each, 24 × 20 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "pets"


def ready(root: Path, **settings) -> ImageFolder:
    source = ImageFolder(root=str(root), **{"image_size": 16, "batch_size": 4, **settings})
    source.setup()
    return source


def spoil(root: Path, *names: str) -> None:
    """Truncate, empty and fill with text, in turn."""
    for i, name in enumerate(names):
        file = root / name
        file.write_bytes([file.read_bytes()[:200], b"", b"not an image"][i % 3])


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "data.image_folder" and r.levelno == logging.WARNING]


def test_the_yaml_gives_batches_of_the_promised_form(root):
    config = OmegaConf.load(YAML)
    source = instantiate(config, root=str(root), image_size=16, batch_size=4, num_workers=0)
    assert (source.name, source.num_classes, source.image_size) == ("pets", 2, 16)
    source.setup()
    for train, dtype in ((source.train_dataloader(), torch.uint8), (delivered(source)["train"], torch.float32)):
        assert [images.shape for images, _ in train] == [(4, 3, 16, 16)] * 3
        assert all(images.dtype == dtype and labels.dtype == torch.int64 for images, labels in train)
    assert [labels.tolist() for _, labels in source.val_dataloader()] == [[0, 0, 0, 1], [1, 1]]


def test_name_is_a_setting(root):
    assert ready(root, name="imagenet").name == "imagenet"
    assert ready(root / "train" / "..").name == "pets"


def test_training_augments_and_evaluation_does_not(root):
    source = ready(root)
    torch.manual_seed(0)
    assert not torch.equal(source.train_data[0][0], source.train_data[0][0])
    assert torch.equal(source.val_data[0][0], source.val_data[0][0])


def test_scale_reaches_the_crop(root):
    torch.manual_seed(0)
    whole = ready(root, scale=(1, 1), image_size=20)
    small = ready(root, scale=(0.01, 0.01), image_size=20)
    # a small piece of noise, enlarged, is smooth; the whole image is not
    rough = [source.train_data[0][0].float().diff(dim=-1).abs().mean() for source in (whole, small)]
    assert rough[0] > 2 * rough[1]


def test_evaluation_resizes_the_shorter_side_then_crops_the_centre(root):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 255  # the centre of a 2:1 image is white
    source = ready(root, image_size=18, crop_pct=0.9, mean=[0.5, 0, 0], std=[0.5, 1, 1])
    image = source.normalise(source.val_data.transform(Image.fromarray(pixels)))  # 18/0.9 = 20: no resampling
    assert image.shape == (3, 18, 18)
    assert torch.equal(image, torch.ones(3, 18, 18))


def test_evaluation_is_timms_for_the_published_models_pixel_for_pixel(root):
    config = timm.get_pretrained_cfg("t2t_vit_7").to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(config))
    noise = np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "val" / "cat" / "noise.png")
    source = ready(root, image_size=224)
    ours = torch.cat([images for images, _ in delivered(source)["val"]])
    assert torch.equal(ours, torch.stack([theirs(Image.open(path)) for path, _ in source.val_data.samples]))


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
def test_training_is_timms_pixel_for_pixel(root, policy):
    settings = {"scale": (0.2, 0.9), "auto_augment": policy, "interpolation": "random"}
    settings |= {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    source = ready(root, image_size=32, **settings)
    theirs = timm.data.create_transform(32, is_training=True, color_jitter=0.0, **settings)
    expected = []
    for index, seed in source.train_dataloader().sampler:
        with Image.open(source.train_data.samples[index][0]) as image, seeded(seed):
            expected.append(theirs(image))
    ours = torch.cat([images for images, _ in delivered(source)["train"]])
    assert torch.equal(ours, torch.stack(expected))


def test_an_augmentation_policy_reaches_the_training_images(root):
    names = [
        [type(step).__name__ for step in ready(root, auto_augment=policy).train_data.transform.transforms]
        for policy in (None, "rand-m9-mstd0.5-inc1")
    ]
    assert "RandAugment" not in names[0]
    assert "RandAugment" in names[1]


def test_every_operation_of_the_policy_works_at_full_magnitude(root):
    steps = ready(root, auto_augment="rand-m9-mstd0.5-inc1").train_data.transform.transforms
    policy = next(step for step in steps if type(step).__name__ == "RandAugment")
    for operation in policy.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10.0, 0.0
        assert operation(Image.new("RGB", (20, 20), (200, 100, 50))).size == (20, 20)


# --- what is wrong with the tree ---------------------------------------------------------------------------------


def complaint(root, **settings) -> str:
    with pytest.raises(SettingError) as caught:
        ImageFolder(root=str(root), **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_root_missing(tmp_path):
    gone = tmp_path / "gone"
    assert complaint(gone) == f"data.root={str(gone)!r} does not exist: {TREE}"


def test_root_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert complaint(file) == f"data.root={str(file)!r} is not a folder: {TREE}"


def test_root_empty(tmp_path):
    assert complaint(tmp_path) == f"data.root={str(tmp_path)!r} is empty: {TREE}"


@pytest.mark.parametrize("split", ["train", "val"])
def test_lacks_a_split(root, split):
    shutil.rmtree(root / split)
    assert complaint(root) == f"data.root={str(root)!r} lacks {split}/: {TREE}"


def test_lacks_both_splits(tmp_path):
    (tmp_path / "cat").mkdir()
    assert complaint(tmp_path) == f"data.root={str(tmp_path)!r} lacks train/ and val/: {TREE}"


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert complaint(tmp_path) == f"data.root={str(tmp_path)!r} has no class folders in train/ and val/: {TREE}"


def test_classes_differ(root):
    shutil.rmtree(root / "val" / "dog")
    for name in "edcba":
        (root / "val" / name).mkdir()
    assert complaint(root) == (
        f"data.root={str(root)!r} has different classes in its splits "
        f"(only in train/: dog; only in val/: a, b, c and 2 more): {TREE}"
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_without_images(root, split):
    for file in (root / split / "cat").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert complaint(root) == (f"data.root={str(root)!r} has class folders without an image in {split}/ (cat): {TREE}")


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("image_size", 0, "a positive number of pixels"),
        ("scale", [0.5], "two numbers with 0 < smallest <= largest <= 1"),
        ("scale", [0.5, 0.1], "two numbers with 0 < smallest <= largest <= 1"),
        ("crop_pct", 0, "a number in (0, 1]"),
        ("interpolation", "nearest", "one of bilinear, bicubic, random"),
        ("max_unreadable", -1, "0 or more images"),
        ("mean", [0.5], "three numbers"),
        ("std", [1, 1, 0], "three positive numbers"),
    ],
)
def test_out_of_range(root, setting, value, allowed):
    expected = f"data.{setting}={value!r} is not possible: set data.{setting} to {allowed}"
    assert complaint(root, **{setting: value}) == expected


def test_root_left_empty():
    assert complaint("") == "data.root='' is not possible: set data.root to a folder with train/ and val/"


# --- images that cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted_once(root, caplog, workers):
    bad = ["val/cat/0.jpg", "val/cat/2.jpg", "val/dog/1.jpg"]
    spoil(root, *bad)
    source = ready(root, max_unreadable=3, num_workers=workers, batch_size=3)
    loader = source.val_dataloader()
    for _ in range(3):  # epochs
        assert [labels.tolist() for _, labels in loader] == [[0], [1, 1]]
    assert warnings(caplog) == [
        f"skipped an unreadable image ({i + 1} so far): {root / name}" for i, name in enumerate(bad)
    ]


def too_many(root, limit: int, last: str) -> str:
    return (
        f"data.max_unreadable={limit} unreadable images are skipped, and one more was met: {root / last}; "
        "repair or remove the files, or set data.max_unreadable to a larger number"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_one_unreadable_image_more_than_allowed(root, workers):
    spoil(root, "val/cat/0.jpg", "val/cat/2.jpg", "val/dog/1.jpg")
    source = ready(root, max_unreadable=2, num_workers=workers, batch_size=3)
    with pytest.raises(SettingError) as caught:
        list(source.val_dataloader())
    assert str(caught.value) == too_many(root, 2, "val/dog/1.jpg")


def test_both_splits_count_together(root):
    spoil(root, "train/cat/0.jpg", "val/cat/0.jpg")
    source = ready(root, max_unreadable=1, batch_size=12)
    assert [len(labels) for _, labels in source.train_dataloader()] == [11]
    with pytest.raises(SettingError) as caught:
        list(source.val_dataloader())
    assert str(caught.value) == too_many(root, 1, "val/cat/0.jpg")


def test_none_allowed(root):
    spoil(root, "val/cat/0.jpg")
    with pytest.raises(SettingError) as caught:
        list(ready(root, max_unreadable=0).val_dataloader())
    assert str(caught.value) == too_many(root, 0, "val/cat/0.jpg")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_without_a_readable_image(root, workers):
    spoil(root, "val/cat/0.jpg", "val/cat/1.jpg", "val/cat/2.jpg")
    with pytest.raises(SettingError) as caught:
        list(ready(root, batch_size=3, num_workers=workers).val_dataloader())
    assert str(caught.value) == (
        "data: a batch of 3 holds no readable image; repair or remove "
        "the files named in the log, or set data.batch_size or data.eval_batch_size higher"
    )


def test_the_count_survives_spawned_workers(root):
    spoil(root, "val/cat/0.jpg", "val/dog/1.jpg")
    source = ready(root)
    plain = source.val_dataloader()
    loader = type(plain)(
        source.val_data,
        batch_size=3,
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=source.collate,
        unreadable=source.unreadable,
    )
    assert isinstance(plain, DataLoader)
    assert [len(labels) for _, labels in loader] == [2, 2]
    assert source.unreadable.flags.sum() == 2


class Mean(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.linear(images.mean((2, 3))), labels)

    def validation_step(self, batch, index):
        self.training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_trainer_passes_the_one_line_on(root, tmp_path):
    spoil(root, "train/cat/0.jpg", "train/dog/0.jpg")
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    with pytest.raises(SettingError) as caught:
        trainer.fit(Mean(), datamodule=ready(root, max_unreadable=1, num_workers=1, batch_size=6))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.max_unreadable=1 ")
