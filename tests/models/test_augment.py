"""Augmentation of whole batches."""

import pytest
import torch

from models.augment import BatchAugment

OFF = {"mixup": 0.0, "cutmix": 0.0, "switch": 0.5, "label_smoothing": 0.0, "erasing": 0.0, "num_classes": 10}


@pytest.fixture
def batch():
    images = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)  # one value an image
    return images, torch.arange(8)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_mix_as_the_images_do(batch, kind):
    images, labels = batch
    mixed, targets = BatchAugment(**{**OFF, kind: 1.0})(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert (targets > 0).sum(1).max() == 2
    # Mean brightness is the targets' mean of the brightness of each class, i.e. of label + 1.
    expected = (targets * torch.arange(1.0, 11.0)).sum(1)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, atol=1e-4, rtol=0)
    assert images[0].eq(1).all()  # the batch itself is left alone


def test_label_smoothing_leaves_every_class_its_share(batch):
    _, targets = BatchAugment(**{**OFF, "mixup": 0.8, "label_smoothing": 0.1})(*batch)
    assert targets.min() == pytest.approx(0.01, abs=1e-6)


def test_erasing_comes_after_mixing_and_replaces_a_rectangle_by_noise(batch):
    images, labels = batch
    erased, _ = BatchAugment(**{**OFF, "mixup": 0.8, "erasing": 1.0})(images, labels)
    whole = [len(image[0].unique()) == 1 for image in erased]
    assert not any(whole)  # a mixed image of two constant ones is constant but for the noise


def test_an_odd_batch_loses_its_last_image(batch):
    images, labels = batch
    mixed, targets = BatchAugment(**{**OFF, "mixup": 0.8})(images[:7], labels[:7])
    assert len(mixed) == len(targets) == 6
