"""Models by name, ours and timm's own, with dense and STL layers."""

from functools import partial

import pytest
import torch
from torch import nn

from models.build import build_model
from models.low_rank import LowRankLinear
from stl import SettingError, STLLinear

STL = partial(STLLinear, tile=4, rank=16)


def stl_layers(model: nn.Module) -> int:
    return sum(isinstance(module, STLLinear) for module in model.modules())


def test_our_models_are_built_with_the_linear_layer():
    model = build_model("t2t_vit_tiny", num_classes=7, img_size=48, linear=STL, linear_groups=["head"])
    assert isinstance(model.head, STLLinear)
    assert stl_layers(model) == 1
    assert model.img_size == (48, 48)
    assert model.num_classes == 7


@pytest.mark.parametrize(("linear", "swapped"), [(nn.Linear, 0), (partial(nn.Linear), 0), (STL, 5)])
def test_timm_models_are_converted(linear, swapped):
    model = build_model("vit_tiny_patch16_224", num_classes=5, img_size=64, linear=linear, depth=1)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert stl_layers(model) == swapped


def test_models_without_an_image_size_are_built_too():
    assert stl_layers(build_model("resnet10t", num_classes=5, img_size=64, linear=STL)) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("t2t_vit_8", {}, "model.name='t2t_vit_8' is unknown; close to it: t2t_vit_"),
        ("t2t_vit_tiny", {"width": 3}, "model.name='t2t_vit_tiny': .*'width'; remove that setting from model"),
        ("vit_tiny_patch16_224", {"linear": nn.Bilinear}, "takes linear=dense or linear=stl only"),
        ("vit_tiny_patch16_224", {"linear": partial(LowRankLinear, factor=2)}, "takes linear=dense or linear=stl only"),
    ],
)
def test_what_cannot_be_built_is_named(name, settings, message):
    with pytest.raises(SettingError, match=message):
        build_model(name, num_classes=5, img_size=64 if name.startswith("t2t") else 224, **settings)
