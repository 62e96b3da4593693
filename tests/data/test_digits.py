from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data.digits import Digits

YAML = Path(__file__).parents[2] / "configs" / "data" / "digits.yaml"


@pytest.fixture(scope="module")
def plain() -> Digits:
    source = Digits(image_size=16, augment=False, batch_size=100)
    source.setup()
    return source


def test_the_yaml_gives_batches_of_the_promised_form():
    source = instantiate(OmegaConf.load(YAML))
    assert (source.name, source.num_classes, source.image_size) == ("digits", 10, 32)
    source.setup()
    for loader in (source.train_dataloader(), source.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (32, 3, 32, 32)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.isfinite().all()


def test_split_is_disjoint_complete_and_stratified(plain):
    train, val = plain.train_data, plain.val_data
    assert (len(train), len(val)) == (1437, 360)
    share = val.labels.bincount(minlength=10) / (train.labels.bincount() + val.labels.bincount())
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.005)
    distinct = {image.numpy().tobytes() for image in torch.cat([train.images, val.images])}
    assert len(distinct) == 1797  # no two digits are alike, so none is on both sides


def test_split_depends_on_its_seed_alone(plain):
    torch.manual_seed(123)
    same, other = Digits(image_size=16), Digits(image_size=16, split_seed=1)
    same.setup()
    other.setup()
    assert torch.equal(same.val_data.images, plain.val_data.images)
    assert not torch.equal(other.val_data.labels, plain.val_data.labels)


def test_normalised_by_the_training_split(plain):
    train, val = (torch.stack([image for image, _ in split]) for split in (plain.train_data, plain.val_data))
    assert abs(train.mean()) < 1e-4
    assert abs(train.std() - 1) < 1e-4
    assert abs(val.mean()) > 1e-4  # the held-out split took no part


def test_evaluation_sees_each_image_once_and_unchanged(plain):
    batches = list(plain.val_dataloader())
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, torch.stack([image for image, _ in plain.val_data]))


def test_augmentation_moves_the_ink_and_keeps_the_paper():
    source = Digits(batch_size=100)
    source.setup()
    torch.manual_seed(0)
    (first, _), (again, _) = source.train_data[0], source.train_data[0]
    assert not torch.equal(first, again)
    assert torch.equal(first[0], first[2])
    paper = source.val_data[0][0].min()
    source.train_data.images.zero_()
    for i in range(20):
        assert torch.equal(source.train_data[i][0], paper.expand(3, 32, 32))  # what moves in from outside is not grey
