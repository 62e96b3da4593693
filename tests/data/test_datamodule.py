"""The base class, and the YAMLs of every source."""

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import RandomSampler, TensorDataset

from data.cifar import CIFAR
from data.datamodule import ImageDataModule
from data.digits import Digits
from data.image_folder import ImageFolder
from stl.errors import SettingError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


class Constant(ImageDataModule):
    name = "constant"
    num_classes = 2

    def __init__(self, length: int, **loading) -> None:
        super().__init__(image_size=4, **loading)
        self.length = length

    def train_set(self):
        return TensorDataset(torch.zeros(self.length, 3, 4, 4), torch.arange(self.length))

    val_set = train_set


def ready(length: int, **loading) -> Constant:
    source = Constant(length, **loading)
    source.setup()
    return source


def test_training_shuffles_and_drops_the_incomplete_batch():
    loader = ready(10, batch_size=4).train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)
    assert [len(labels) for _, labels in loader] == [4, 4]


def test_a_set_smaller_than_a_batch_is_trained_on():
    assert [len(labels) for _, labels in ready(3, batch_size=4).train_dataloader()] == [3]


def test_evaluation_keeps_order_and_every_image():
    loader = ready(10, batch_size=4, eval_batch_size=3).val_dataloader()
    batches = [labels.tolist() for _, labels in loader]
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_eval_batch_size_defaults_to_batch_size():
    assert Constant(1, batch_size=7).eval_batch_size == 7


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
        ("eval_batch_size", -1, "a positive number of images, or null for batch_size"),
        ("num_workers", -1, "0 (load in the main process) or more"),
    ],
)
def test_out_of_range(setting, value, allowed):
    with pytest.raises(SettingError) as caught:
        ImageDataModule(**{"image_size": 32, setting: value})
    assert str(caught.value) == f"data.{setting}={value!r} is not possible: set data.{setting} to {allowed}"


@pytest.mark.parametrize(
    ("file", "source"), [("digits", Digits), ("cifar10", CIFAR), ("cifar100", CIFAR), ("image_folder", ImageFolder)]
)
def test_yaml_shows_every_argument(file, source):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{file}.yaml"))
    parameters = {**inspect.signature(ImageDataModule).parameters, **inspect.signature(source).parameters}
    del parameters["loading"]
    assert config.pop("_target_") == f"{source.__module__}.{source.__name__}"
    assert set(config) == set(parameters)
