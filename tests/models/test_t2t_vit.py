"""T2T-ViT: published sizes and costs, the official checkpoints' logits, isolation of samples, timm's conventions."""

from functools import partial
from itertools import cycle, product

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.t2t_vit import VARIANTS, T2TViT, token_permutation
from models.tokens_to_token import TokenPerformer, soft_split_grids, soft_split_strides
from stl import SettingError, STLLinear, convert, count_flops

STL = {tile: partial(STLLinear, tile=tile, rank=tile**2) for tile in (2, 4, 8)}

# Linear and total GMACs, trainable and all parameters at 224², as the dense models are published.
DENSE = {
    "t2t_vit_7": ("0.976", "1.147", "4.256", "4.310"),
    "t2t_vit_10": ("1.285", "1.516", "5.835", "5.889"),
    "t2t_vit_12": ("1.492", "1.763", "6.887", "6.942"),
    "t2t_vit_14": ("4.334", "4.783", "21.466", "21.546"),
    "t2t_vit_19": ("7.787", "8.480", "39.085", "39.177"),
    "t2t_vit_24": ("12.676", "13.662", "64.001", "64.106"),
}


def create(name: str = "t2t_vit_tiny", **kwargs) -> T2TViT:
    with torch.device("meta") if kwargs.pop("meta", False) else torch.device("cpu"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", DENSE)
def test_dense_costs_are_the_published_ones(name):
    model = create(name, meta=True)
    report = count_flops(model, (3, 224, 224))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    got = (report.linear / 1e9, report.total / 1e9, trainable / 1e6, report.params / 1e6)
    assert tuple(f"{value:.3f}" for value in got) == DENSE[name]


def test_t2t_vit_14_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in create("t2t_vit_14").parameters()) == 21_545_550


LINEARS = {"dense": nn.Linear, **{f"t{tile}": stl for tile, stl in STL.items()}}
# Each model with a kind of layers in turn; the least of them, with performers and with transformers, with every kind.
MEASURED = {*zip(VARIANTS, cycle(LINEARS)), *product(("t2t_vit_tiny", "t2t_vit_t_14"), LINEARS)}


@pytest.mark.parametrize(("name", "linear"), sorted(MEASURED))
def test_analytic_macs_are_the_measured_ones_layer_by_layer(name, linear):
    model = create(name, linear=LINEARS[linear], meta=True).eval()
    side = model.img_size[0]
    report = count_flops(model, (2, 3, side, side))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(2, 3, side, side, device="meta"))
    measured = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    rows = [row for row in report.layers if row.kind != "product"]
    assert len(rows) == sum(isinstance(module, nn.Linear | STLLinear) for module in model.modules())
    for row in rows:
        assert 2 * row.macs == measured[f"T2TViT.{row.name}"], row
    assert 2 * report.total == counter.get_total_flops()


@pytest.mark.parametrize("tile", STL)
def test_an_stl_model_knows_what_its_dense_twin_costs(tile):
    dense, stl = (
        count_flops(create("t2t_vit_7", meta=True, **kw), (3, 224, 224)) for kw in ({}, {"linear": STL[tile]})
    )
    assert stl.dense_macs == {"total": dense.total, "linear": dense.linear}
    assert stl.flop_factor["core"] == pytest.approx(tile)


def sine_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that depend on names and shapes alone."""
    weights = {}
    for index, (name, value) in enumerate(sorted(state_dict.items())):
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (0.1 + 0.01 * index)).reshape(value.shape)
        if "norm" in name and name.endswith("weight"):
            wave = 1 + 0.1 * wave
        elif not name.endswith(".w"):
            wave = 0.05 * wave
        weights[name] = wave.float()
    return weights


@pytest.mark.parametrize(
    ("name", "logits", "norm", "keys"),
    [
        ("t2t_vit_7", [1.96063, -4.0146, -1.3079, 4.27927, 0.70482, -4.41053], 97.93762, 111),
        ("t2t_vit_t_14", [-0.0666, 0.10253, -0.04185, -0.03646, 0.02638, 0.01338], 2.03118, 184),
    ],
)
def test_official_checkpoints_give_the_official_logits(name, logits, norm, keys):
    """The figures come from one run of the official code on the same weights and the same image."""
    model = create(name).eval()
    weights = sine_weights(model.state_dict())
    assert len(weights) == keys
    model.load_official_state_dict({"state_dict_ema": {f"module.{key}": value for key, value in weights.items()}})
    image = 1.5 * torch.cos(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.37).reshape(1, 3, 224, 224).float()
    with torch.no_grad():
        got = model(image)[0]
    torch.testing.assert_close(got[:6], torch.tensor(logits), atol=5e-5, rtol=1e-5)
    assert got.norm().item() == pytest.approx(norm, rel=1e-5)


def test_official_names_of_parameters():
    performer = {f"tokens_to_token.attention{i}.{part}" for i in (1, 2) for part in ("w", "kqv.weight", "mlp.2.bias")}
    names = set(create("t2t_vit_7").state_dict())
    assert performer | {"tokens_to_token.project.weight", "pos_embed", "cls_token", "blocks.6.mlp.fc2.bias"} <= names
    assert "blocks.0.attn.qkv.bias" not in names


def test_a_checkpoint_of_another_size_resamples_the_positions_and_a_foreign_one_is_refused():
    model = create(num_classes=10, img_size=48)
    small = create(num_classes=10)
    model.load_official_state_dict(small.state_dict())
    torch.testing.assert_close(model.pos_embed[:, 0], small.pos_embed[:, 0])
    with pytest.raises(SettingError, match=r"does not fit this model: .*head.weight"):
        create(num_classes=7).load_official_state_dict(small.state_dict())


@pytest.mark.parametrize("size", [32, 33, 47, 64, 100, 224, 384, (32, 64)])
def test_every_image_size_keeps_at_least_8_by_8_tokens(size):
    image = (size, size) if isinstance(size, int) else size
    assert min(soft_split_grids(image, soft_split_strides(image))[-1]) >= 8
    model = create(img_size=size, num_classes=3).eval()
    rows, columns = model.grid_size
    features = model.forward_features(torch.zeros(2, 3, *image))
    assert features.shape == (2, 1 + rows * columns, 96)
    assert model.forward_head(features).shape == (2, 3)


def test_strides_are_the_published_ones_at_224_and_follow_small_images():
    assert [soft_split_strides((side, side)) for side in (224, 128, 64, 32)] == [
        (4, 2, 2),
        (4, 2, 2),
        (4, 2, 1),
        (4, 1, 1),
    ]


@pytest.mark.parametrize("basis", ["hadamard", "products"])
@pytest.mark.parametrize("order", ["raster", "block", "random"])
def test_logits_are_the_same_alone_and_in_any_batch(basis, order):
    torch.manual_seed(0)
    linear = partial(STLLinear, tile=4, rank=16, basis=basis)
    model = create(linear=linear, num_classes=10, token_order=order).eval()
    pool = torch.randn(5, 3, 32, 32)
    single, double = (
        torch.cat([model.to(dtype)(image[None]) for image in pool.to(dtype)]).detach()
        for dtype in (torch.float32, torch.float64)
    )

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=7))
    def check(indices):
        with torch.no_grad():
            torch.testing.assert_close(model.float()(pool[indices]), single[indices], atol=1e-5, rtol=0)
            torch.testing.assert_close(model.double()(pool.double()[indices]), double[indices], atol=1e-12, rtol=0)

    check()


def test_the_class_token_goes_last_so_that_patch_tiles_stay_aligned():
    """With a basis that only mixes inside a tile, the first patches do not see the class token through the layer."""
    model = create(linear=STL[4], num_classes=10).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.randn(1, 3, 32, 32)
    model(image)
    patches = model.tokens_to_token(image) + model.pos_embed[:, 1:]
    torch.testing.assert_close(seen[0][:, :-1], patches)
    torch.testing.assert_close(seen[0][:, -1:], model.cls_token + model.pos_embed[:, :1])


@pytest.mark.parametrize("number", [0, 4])
def test_the_head_sees_the_mean_of_the_class_tokens_or_without_any_that_of_the_patches(number):
    torch.manual_seed(0)
    model = create(linear=STL[4], num_classes=10, class_tokens=number).eval()
    image = torch.randn(2, 3, 32, 32)
    features = model.forward_features(image)
    assert features.shape[1] == number + 64
    pooled = features[:, :number] if number else features
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled.mean(1))
    torch.testing.assert_close(model(image), model.head(pooled.mean(1)))


def test_token_order_block_makes_squares_and_features_come_back_in_raster_order():
    order = token_permutation((4, 4), "block")
    assert order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert sorted(token_permutation((7, 5), "block").tolist()) == list(range(35))
    torch.manual_seed(0)
    raster, block = create(num_classes=10).eval(), create(num_classes=10, token_order="block").eval()
    block.load_state_dict(raster.state_dict())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(block.forward_features(image), raster.forward_features(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [(), ("backbone",), ("t2t",), ("head",), ("backbone", "t2t", "head")])
def test_each_group_of_layers_is_switchable(groups):
    model = create(linear=STL[4], linear_groups=groups)
    prefixes = {"backbone": "blocks.", "t2t": "tokens_to_token.", "head": "head"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | STLLinear):
            group = next(group for group, prefix in prefixes.items() if name.startswith(prefix))
            assert isinstance(module, STLLinear) == (group in groups), name


def test_converting_the_dense_model_gives_the_layers_of_building_it_with_stl():
    model = create(num_classes=10)
    report = convert(model, tile=4, rank=16)
    built = create(num_classes=10, linear=STL[4])
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    assert not report.left


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_conventions(name):
    model = create(name, meta=True)
    assert timm.is_model(name)
    assert model.default_cfg["num_classes"] == 1000
    assert model.default_cfg["classifier"] == "head"
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() == {"cls_token"} <= set(dict(model.named_parameters()))


def test_the_classifier_is_reset_to_any_number_of_classes():
    model = create(linear=STL[4]).eval()
    model.reset_classifier(5)
    assert isinstance(model.head, STLLinear)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features)
    with pytest.raises(SettingError, match="global_pool='avg' is unknown; T2T-ViT pools by its class token"):
        model.reset_classifier(5, "avg")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"img_size": 16}, r"img_size=16 must be one side, or height and width, from 32 to 384"),
        ({"linear_groups": ["mlp"]}, "linear_groups has 'mlp'; choose from backbone, t2t, head"),
        ({"token_order": "spiral"}, "token_order='spiral' is unknown; choose one of raster, block"),
        ({"class_tokens": -1}, "class_tokens=-1 must be 0, for the mean of the patches, or more"),
        ({"strides": [4, 2]}, r"strides=\[4, 2\] must be three positive numbers, one a soft split, or null"),
        ({"tokens": "conv"}, "tokens='conv' is unknown; choose one of performer, transformer"),
    ],
)
def test_impossible_settings_are_named(settings_, message):
    with pytest.raises(SettingError, match=message):
        create(**settings_)


def test_images_of_another_size_are_refused():
    with pytest.raises(SettingError, match=r"images have shape \(1, 3, 40, 40\); this model takes"):
        create()(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
def test_the_performer_is_finite_in_low_precision(dtype, scale):
    torch.manual_seed(0)
    layer = TokenPerformer(147, 64, nn.Linear).eval()
    x = scale * torch.randn(2, 64, 147)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.float().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(("linear", "training"), [(nn.Linear, False), (STL[4], True)], ids=["dense", "stl"])
def test_the_whole_model_compiles_without_graph_breaks(linear, training):
    torch._dynamo.reset()
    model = create(linear=linear, num_classes=10, t2t_drop_rate=0.0, depth=1).train(training)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("linear", [nn.Linear, STL[4]], ids=["dense", "stl"])
def test_what_is_exported_takes_any_batch(linear):
    model = create(linear=linear, num_classes=10, depth=1, img_size=32).eval()
    images = torch.randn(3, 3, 32, 32)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(images[:2]), model(images[:2]), atol=1e-5, rtol=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    model = create(linear=STL[4], num_classes=10, t2t_drop_rate=0.0)
    images, gradients = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(images).square().sum(), model.blocks[0].mlp.fc1.weight)[0])
    torch.testing.assert_close(*gradients)


def test_dropout_of_the_t2t_module_is_the_official_one_unless_set():
    def rates(name, **kwargs):
        module = create(name, meta=True, **kwargs).tokens_to_token
        return {layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)}

    assert rates("t2t_vit_7") == {0.1}
    assert rates("t2t_vit_t_14") == {0.0}
    assert rates("t2t_vit_t_14", t2t_drop_rate=0.3) == {0.3}


def test_stl_weights_start_with_the_variance_of_the_dense_model():
    torch.manual_seed(0)
    layer = create("t2t_vit_7", linear=STL[4]).blocks[0].mlp.fc1
    assert layer.weight.std().item() == pytest.approx(2 * 0.02, rel=0.02)  # √t times
