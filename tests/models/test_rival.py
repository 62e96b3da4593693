"""What all rivals of STL have in common: shapes, variance, counts, precision, roles, and their place in T2T-ViT."""

from functools import partial
from math import prod

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from running import CONFIGS, QUICK, evaluate, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.dense_mixer import MixingLinear
from models.low_rank import LowRankLinear
from models.monarch import MonarchLinear
from models.optimizer import parameter_roles
from models.rival import RivalLinear
from models.sparse24 import Sparse24Linear
from stl import SettingError, count_flops
from stl.flops import CountedLinear

few = settings(deadline=None, derandomize=True, max_examples=12)

RIVALS: dict[str, type[RivalLinear]] = {
    "low_rank": LowRankLinear,
    "monarch": MonarchLinear,
    "sparse24": Sparse24Linear,
    "dense_mixer": MixingLinear,
}
MAKERS = {**RIVALS, "sliding": partial(MixingLinear, window="sliding")}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tiny(linear, **settings) -> nn.Module:
    return timm.create_model("t2t_vit_tiny", num_classes=10, linear=linear, t2t_drop_rate=0.0, **settings)


@pytest.mark.parametrize("name", MAKERS)
@given(shape=st.lists(st.integers(1, 9), max_size=3), k=st.integers(1, 40), m=st.integers(1, 40), bias=st.booleans())
@few
def test_any_size_has_its_shape_and_is_counted_as_measured(name, shape, k, m, bias):
    layer = MAKERS[name](k, m, bias)
    x = gaussian(*shape, k)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = layer(x)
    assert y.shape == (*shape, m)
    assert (layer.bias is not None) == bias
    report = count_flops(layer, x.shape)
    (row,) = report.layers
    assert isinstance(layer, CountedLinear)
    assert (row.kind, row.rows, row.in_features, row.out_features) == (layer.kind, prod(shape), k, m)
    assert report.dense_macs["linear"] == row.dense_macs == prod(shape) * k * m
    assert report.flop_factor["linear"] == pytest.approx(row.dense_macs / row.macs)
    assert report.flop_factor["core"] == 1.0
    if name == "sparse24":
        assert row.macs == prod(shape) * m * (k // 4 * 2 + k % 4)
    else:
        assert 2 * row.macs == counter.get_total_flops()


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("k", "m"), [(147, 192), (256, 200), (512, 512)])
@pytest.mark.parametrize("std", [None, 0.02])
def test_a_fresh_layer_gives_the_variance_of_a_dense_one(name, k, m, std):
    torch.manual_seed(0)
    layer = RIVALS[name](k, m)
    if std is not None:
        layer.reset_parameters(std)
    with torch.no_grad():
        variance = layer(gaussian(4, 256, k)).var().item()
    assert variance == pytest.approx(1 / 3 if std is None else k * std**2, rel=0.08)


@pytest.mark.parametrize("name", RIVALS)
def test_reset_parameters_draws_again_and_zeroes_the_bias(name):
    layer = RIVALS[name](8, 6)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert layer.bias.eq(0).all()
    assert all(parameter.requires_grad for parameter in layer.parameters())
    drawn = set(before) - {"bias", "kernel"}
    assert all(not torch.equal(before[key], layer.state_dict()[key]) for key in drawn)


@pytest.mark.parametrize("name", MAKERS)
def test_it_compiles_in_one_graph_and_takes_bfloat16(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, dense = MAKERS[name](147, 20), nn.Linear(147, 20)
    x = gaussian(2, 6, 147)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward(x)
            assert y.dtype == dense(x).dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[0][0].float(), layer(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("low_rank", {"inner": "dense", "outer": "dense"}),
        ("monarch", {"first": "dense", "second": "dense"}),
        ("sparse24", {"weight": "dense"}),
        ("dense_mixer", {"weight": "dense", "kernel": "basis"}),
    ],
)
def test_matrices_have_weight_decay_and_kernels_that_mix_tokens_have_none(name, roles):
    assert parameter_roles(RIVALS[name](8, 8)) == {**roles, "bias": "bias_norm"}
    model = nn.Sequential(RIVALS[name](8, 8, bias=False))
    assert parameter_roles(model) == {f"0.{key}": role for key, role in roles.items()}


@pytest.mark.parametrize("name", RIVALS)
def test_t2t_vit_draws_all_its_layers_and_gives_every_parameter_a_gradient(name):
    """DDP needs the gradients."""
    torch.manual_seed(0)
    model = tiny(RIVALS[name])
    layers = [module for module in model.modules() if isinstance(module, RIVALS[name])]
    assert len(layers) == 22
    fc1 = model.blocks[0].mlp.fc1
    with torch.no_grad():
        assert fc1(gaussian(4, 256, 96)).std().item() == pytest.approx(0.02 * 96**0.5, rel=0.1)
    model(gaussian(2, 3, 32, 32)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.reset_classifier(7)
    assert isinstance(model.head, RIVALS[name])


@pytest.mark.parametrize("name", MAKERS)
def test_samples_do_not_see_each_other(name):
    torch.manual_seed(0)
    model = tiny(MAKERS[name]).eval()
    for layer in model.modules():
        if isinstance(layer, MixingLinear):
            nn.init.normal_(layer.kernel, std=0.1)
    images = gaussian(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings_", "message"),
    [
        ("low_rank", {"factor": 0.5}, "factor=0.5 must be a number from 1 on"),
        ("monarch", {"factor": float("nan")}, "factor=nan must be a number from 1 on"),
        ("sparse24", {"decay": -1.0}, "decay=-1.0 must be a number that is not negative"),
        ("sparse24", {"fixed_mask": "once"}, "fixed_mask='once' must be true or false"),
        ("sparse24", {"pruning": "random"}, "pruning='random' is unknown; choose one of magnitude, wanda"),
        ("dense_mixer", {"window": "tiles"}, "window='tiles' is unknown; choose one of blocks, sliding"),
        ("dense_mixer", {"kernel_size": 0}, "kernel_size=0 must be positive"),
        ("dense_mixer", {"in_features": 0}, "in_features=0 out_features=8 must both be positive"),
    ],
)
def test_impossible_settings_are_named(name, settings_, message):
    with pytest.raises(SettingError, match=message):
        RIVALS[name](**{"in_features": 8, "out_features": 8, **settings_})


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("low_rank", {"factor": 2.667}),
        ("monarch", {"factor": 2.667}),
        ("sparse24", {"decay": 2e-4, "pruning": "magnitude", "fixed_mask": False}),
        ("dense_mixer", {"kernel_size": 4, "window": "blocks"}),
    ],
)
def test_a_run_trains_and_says_what_it_was(name, own, tmp_path):
    summary = run(tmp_path, *QUICK, f"linear={name}", "logger=csv")
    assert summary["linear"] == {"type": name, "tile": None, "rank": None, "basis": None, **own}
    assert summary["flop_factor"]["core"] == 1.0


def test_a_checkpoint_is_evaluated_with_its_own_layers(tmp_path):
    summary = run(tmp_path, *QUICK, "linear=monarch", "logger=csv")
    figures = evaluate(tmp_path / "checkpoints" / "last.ckpt")
    for key in ("linear", "params", "macs", "flop_factor"):
        assert figures[key] == summary[key], key


def test_the_layers_of_the_configs_are_these():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name, kind in RIVALS.items():
            made = instantiate(compose("train", [f"linear={name}"]).linear)(8, 8)
            assert type(made) is kind
            assert made.extra_repr() == kind(8, 8).extra_repr()
