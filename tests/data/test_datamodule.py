"""The base class, and the YAMLs of every source."""

import inspect
from pathlib import Path

import pytest
import torch
from delivery import delivered
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.data import TensorDataset

from data.cifar import CIFAR
from data.datamodule import BatchDataModule, ImageDataModule
from data.digits import Digits
from data.image_folder import ImageFolder
from data.shards import Shards
from stl.errors import SettingError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


class Constant(ImageDataModule):
    name = "constant"
    num_classes = 2

    def __init__(self, length: int, *, pixel: float | torch.Tensor = 0.0, **loading) -> None:
        super().__init__(image_size=4, **loading)
        self.length = length
        self.pixel = torch.as_tensor(pixel)

    def train_set(self):
        return TensorDataset(self.pixel.expand(self.length, 3, 4, 4), torch.arange(self.length))

    val_set = train_set


def ready(length: int, **loading) -> Constant:
    source = Constant(length, **loading)
    source.setup()
    return source


class Trainer:
    """A trainer as far as a data module looks at it."""

    def __init__(self, rank: int, world: int, source: ImageDataModule) -> None:
        self.global_rank, self.world_size = rank, world
        source.trainer = self


def labels_of(source: Constant, *, epoch: int = 0, batches: int = 0) -> list[list[int]]:
    source._position = {"epoch": epoch, "batches": batches}
    return [labels.tolist() for _, labels in source.train_dataloader()]


def test_training_shuffles_and_drops_the_incomplete_batch():
    first, second = labels_of(ready(10, batch_size=4)), labels_of(ready(10, batch_size=4), epoch=1)
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [4, 4]
    assert first != second
    assert len({label for batch in first for label in batch}) == 8
    assert first == labels_of(ready(10, batch_size=4))
    assert first != labels_of(ready(10, batch_size=4, seed=1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_is_entered_anywhere_and_goes_on_as_it_would_have(workers):
    whole = labels_of(ready(23, batch_size=4), epoch=2)
    for done in range(len(whole)):
        assert labels_of(ready(23, batch_size=4, num_workers=workers), epoch=2, batches=done) == whole[done:]


@given(images=st.integers(1, 60), batch=st.integers(1, 24), devices=st.integers(1, 4), steps=st.integers(1, 3))
def test_devices_divide_each_step_of_one_device(images, batch, devices, steps):
    batch *= devices * steps
    whole = labels_of(ready(images, batch_size=batch))
    parts = []
    for device in range(devices):
        source = ready(images, batch_size=batch, device_batch_size=batch // devices // steps)
        Trainer(device, devices, source)
        assert source.split(devices) == (batch // devices // steps, steps)
        parts.append(labels_of(source))
    assert len({len(part) for part in parts}) == 1
    if images < batch:  # one smaller batch, of which each device has as much as the others
        assert len({label for part in parts for own in part for label in own}) == images - images % devices
        return
    for step, expected in enumerate(whole):
        taken = [label for part in parts for own in part[step * steps : (step + 1) * steps] for label in own]
        assert sorted(taken) == sorted(expected)


@pytest.mark.parametrize(("batch", "own", "devices"), [(512, None, 3), (512, 200, 1), (512, 1024, 1), (8, None, 16)])
def test_an_impossible_split_is_an_error(batch, own, devices):
    with pytest.raises(SettingError, match=f"data.batch_size={batch} does not split over {devices} device"):
        Constant(4, batch_size=batch, device_batch_size=own).split(devices)


@pytest.mark.parametrize(("images", "devices", "size"), [(10, 3, 3), (10, 4, 2), (7, 2, 3), (9, 2, 4), (12, 3, 2)])
def test_evaluation_on_several_devices_takes_every_image_once_in_as_many_batches(images, devices, size):
    parts = []
    for device in range(devices):
        source = ready(images, batch_size=devices, eval_batch_size=size)
        Trainer(device, devices, source)
        parts.append([labels.tolist() for _, labels in source.val_dataloader()])
    assert sorted(label for part in parts for batch in part for label in batch) == list(range(images))
    assert len({len(part) for part in parts}) == 1


def test_more_devices_than_images_to_evaluate_are_an_error():
    source = ready(3, batch_size=4)
    Trainer(0, 4, source)
    with pytest.raises(
        SettingError, match=r"trainer.devices=4 are more than the 3 validation images, .*; set it lower"
    ):
        source.val_dataloader()


def bytes_of_51() -> Constant:
    """A fifth of white: normalised 1, 2 and 4."""
    source = ready(4, pixel=torch.tensor(51, dtype=torch.uint8), batch_size=2)
    source.mean, source.std = torch.tensor([0.1, 0.1, 0]).view(3, 1, 1), torch.tensor([0.1, 0.05, 0.05]).view(3, 1, 1)
    return source


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_uint8_images_reach_the_model_normalised_in_the_trainers_precision(precision, dtype):
    source = bytes_of_51()
    assert next(iter(source.train_dataloader()))[0].dtype == torch.uint8
    for batches in delivered(source, precision).values():
        assert len(batches) == 2
        for images, _ in batches:
            assert images.dtype == dtype
            torch.testing.assert_close(images[:, :, 0, 0].float(), torch.tensor([[1.0, 2.0, 4.0]] * 2))


def test_floating_point_images_reach_the_model_as_they_are():
    (images, _), *_ = delivered(ready(4, pixel=0.3, batch_size=2))["train"]
    assert images.eq(0.3).all()


def test_what_images_are_normalised_with_is_copied_to_a_device_once():
    source = bytes_of_51()
    images = torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta")
    source.normalise(images)
    kept = source.mean, source.std
    source.normalise(images)
    assert source.mean is kept[0]
    assert source.std is kept[1]
    assert source.mean.is_meta
    assert source.std.is_meta


def test_a_set_smaller_than_a_batch_is_trained_on():
    assert [len(labels) for _, labels in ready(3, batch_size=4).train_dataloader()] == [3]


def test_evaluation_keeps_order_and_every_image():
    loader = ready(10, batch_size=4, eval_batch_size=3).val_dataloader()
    batches = [labels.tolist() for _, labels in loader]
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_eval_batch_size_defaults_to_that_of_training():
    assert ready(7, batch_size=4).val_dataloader().batch_size == 4


def test_evaluation_alone_does_not_build_the_training_set():
    source = Constant(3)
    source.setup("validate")
    assert source.train_data is None
    assert len(source.val_data) == 3


def test_workers_persist():
    loader = ready(4, batch_size=2, num_workers=1).val_dataloader()
    assert loader.persistent_workers
    assert [labels.tolist() for _, labels in loader] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("image_size", 0, "a positive number of pixels"),
        ("image_size", 32.5, "a positive number of pixels"),
        ("batch_size", 0, "a positive number of images"),
        ("eval_batch_size", -1, "a positive number of images, or null"),
        ("num_workers", -1, "0 (load in the main process) or more"),
    ],
)
def test_out_of_range(setting, value, allowed):
    with pytest.raises(SettingError) as caught:
        ImageDataModule(**{"image_size": 32, setting: value})
    assert str(caught.value) == f"data.{setting}={value!r} is not possible: set data.{setting} to {allowed}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("digits", Digits),
        ("cifar10", CIFAR),
        ("cifar100", CIFAR),
        ("image_folder", ImageFolder),
        ("imagenet_wds", Shards),
    ],
)
def test_yaml_shows_every_argument(file, source):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{file}.yaml"))
    classes = BatchDataModule, ImageDataModule, source
    parameters = {name for kind in classes for name in inspect.signature(kind).parameters}
    parameters -= {"loading", "seed"}  # the seed is the run's
    assert config.pop("_target_") == f"{source.__module__}.{source.__name__}"
    assert set(config) == parameters
