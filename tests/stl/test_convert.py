import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stl import ConversionReport, SettingError, STLLinear, STLMultiheadAttention, convert

EXACT = {"basis": "strassen", "tile": 2, "rank": 7, "from_dense": True}
INEXACT = {"basis": "frame", "tile": 2, "rank": 5, "from_dense": True}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))).double()


def test_with_an_exact_basis_the_trained_model_stays_the_same(case):
    model, x = case.build(), case.batch()
    with torch.no_grad():
        wanted = model(x)
        report = convert(model, **EXACT)
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    assert len(report.swapped) == case.swapped
    assert report.left == {}
    assert not any(type(m) in (nn.Linear, nn.MultiheadAttention) for m in model.modules())


def test_with_an_inexact_basis_no_fused_path_goes_around_the_swapped_layers(case):
    model, x = case.build(), case.batch()
    with torch.no_grad():
        dense = model(x)
        convert(model, **INEXACT)
        evaluated, trained = model(x), model.train()(x)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-12)
    assert (evaluated - dense).norm() > 0.01 * dense.norm()


@pytest.mark.parametrize("include", [None, "*.linear1", "*.linear2", "*.self_attn"])
@pytest.mark.parametrize("case", ["encoder", "encoder, tokens first", "encoder, norm first"], indirect=True)
def test_fused_paths_stay_off_with_a_padding_mask_and_after_a_copy(case, include):
    model, x = case.build(), case.batch()
    mask = torch.tensor([[False] * (5 - i) + [True] * i for i in range(3)])
    dense = model.train()(x, src_key_padding_mask=mask)
    convert(model, include=include, **INEXACT)
    with torch.no_grad():
        trained = model(x, src_key_padding_mask=mask)
        for evaluated in (model.eval(), copy.deepcopy(model)):
            torch.testing.assert_close(evaluated(x, src_key_padding_mask=mask), trained, rtol=0, atol=1e-12)
    assert (trained - dense).norm() > 0.01 * dense.norm()


@pytest.mark.parametrize("settings", [{"basis": "hadamard", "tile": 4, "rank": 16}, INEXACT])
def test_a_sample_has_the_same_output_alone_and_anywhere_in_a_batch(case, settings):
    model, x = case.build(), case.batch()
    convert(model, **settings)
    with torch.no_grad():
        together = model(x)
        for sample in range(3):
            alone = model(x.narrow(case.batch_axis, sample, 1))
            torch.testing.assert_close(alone, together.narrow(case.batch_axis, sample, 1), rtol=0, atol=1e-12)
        moved = model(x.roll(1, case.batch_axis))
    torch.testing.assert_close(moved, together.roll(1, case.batch_axis), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["encoder"], indirect=True)
@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_row_axis_means_the_same_whatever_the_layout_of_the_transformer(case, row_axis):
    model, x = case.build(), case.batch()
    tokens_first = copy.deepcopy(model)
    for layer in tokens_first.layers:
        layer.self_attn.batch_first = False
    for each in (model, tokens_first):
        convert(each, row_axis=row_axis, **INEXACT)
    with torch.no_grad():
        torch.testing.assert_close(tokens_first(x.transpose(0, 1)).transpose(0, 1), model(x))


@pytest.mark.parametrize("case", ["encoder"], indirect=True)
def test_the_settings_reach_every_layer(case):
    model = case.build()
    convert(model, tile=3, rank=11, basis="random", row_axis="batch", train_basis=False)
    layers = [module for module in model.modules() if isinstance(module, STLLinear)]
    assert len(layers) == 12
    for layer in layers:
        assert (layer.tile, layer.rank, layer.basis, layer.row_axis) == (3, 11, "random", "batch")
        assert not layer.train_basis


def test_from_scratch_draws_anew_and_keeps_the_scale_that_the_model_chose():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.normal_(model[0].weight, std=0.02)
    nn.init.constant_(model[0].bias, 3.0)
    nn.init.zeros_(model[1].weight)  # as the last layer of a residual branch may start
    convert(model)
    assert model[0].weight.std().item() == pytest.approx(2 * 0.02, rel=0.1)
    assert model[0].bias.eq(3).all()
    assert model[1].weight.eq(0).all()


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (None, None, {"0", "2.0", "2.1"}),
        ("2.*", None, {"2.0", "2.1"}),
        (["0", "2.1"], None, {"0", "2.1"}),
        (None, "2.1", {"0", "2.0"}),
        ("*", ("0", "*.0"), {"2.1"}),
        ("2.*", "2.[1-9]", {"2.0"}),
        ((), [], {"0", "2.0", "2.1"}),
    ],
)
def test_patterns_choose_the_layers(include, exclude, swapped):
    model = small()
    report = convert(model, include=include, exclude=exclude, **EXACT)
    assert set(report.swapped) == swapped
    assert set(report.left) == {"0", "2.0", "2.1"} - swapped
    for name in ("0", "2.0", "2.1"):
        assert isinstance(model.get_submodule(name), STLLinear if name in swapped else nn.Linear)
    for reason in report.left.values():
        assert reason in ("in exclude", "not in include")


def test_the_report_names_every_layer_with_what_became_of_it():
    report = convert(small(), exclude="0", tile=2, rank=4)
    assert isinstance(report, ConversionReport)
    head, *lines = str(report).splitlines()
    assert head == "2 linear layers swapped, 1 left"
    assert any(line.split() == ["left", "0:", "in", "exclude"] for line in lines)
    assert any("2.1: STLLinear(in_features=7, out_features=3," in line for line in lines)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class OwnAttention(nn.MultiheadAttention):
    pass


def with_(change: Callable[[nn.Linear], object]) -> nn.Linear:
    linear = nn.Linear(4, 4)
    change(linear)
    return linear


def tied_pair() -> nn.Module:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    return pair


def tied_embedding() -> nn.Module:
    pair = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    return pair


def parametrized_attention() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2)
    parametrizations.weight_norm(attention.out_proj)
    return attention


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tied_pair, "shared with a Linear"),
        (tied_embedding, "shared with a Embedding"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrized"),
        (parametrized_attention, "parametrized"),
        (lambda: with_(lambda m: m.register_forward_hook(lambda *_: None)), "hooks"),
        (lambda: with_(lambda m: m.register_forward_pre_hook(lambda *_: None)), "hooks"),
        (lambda: with_(lambda m: m.register_full_backward_hook(lambda *_: None)), "hooks"),
        (lambda: with_(lambda m: setattr(m, "forward", lambda x: x)), "replaced"),
        (lambda: Scaled(4, 4), "Scaled overrides torch.nn.Linear.forward"),
        (lambda: nn.LazyLinear(4), "lazy"),
        (lambda: OwnAttention(4, 2), "OwnAttention overrides"),
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k"),
        (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn"),
    ],
)
def test_layers_that_cannot_be_swapped_faithfully_are_left_with_the_reason(make, reason):
    odd = make()
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": odd})
    inside = list(odd.modules())
    report = convert(model)
    assert list(report.swapped) == ["plain"]
    assert report.left
    assert all(name.startswith("odd") and reason in why for name, why in report.left.items())
    assert list(model["odd"].modules()) == inside


def test_a_lazy_layer_is_swapped_once_it_has_sizes():
    model = nn.Sequential(nn.LazyLinear(4))
    model(torch.zeros(2, 3))
    assert list(convert(model).swapped) == ["0"]


def test_a_subclass_that_computes_the_same_is_swapped():
    model = nn.Sequential(Renamed(4, 4))
    convert(model)
    assert isinstance(model[0], STLLinear)


def shared() -> nn.ModuleDict:
    linear, block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    return nn.ModuleDict({"a": linear, "b": linear, "c": block, "d": block})


def test_a_module_used_twice_stays_one_module():
    model = shared()
    report = convert(model)
    assert set(report.swapped) == {"a", "b", "c.0", "d.0"}
    assert model["a"] is model["b"]
    assert model["c"][0] is model["d"][0]
    assert isinstance(model["a"], STLLinear)
    assert isinstance(model["c"][0], STLLinear)


@pytest.mark.parametrize(
    ("patterns", "swapped"),
    [
        ({"exclude": "b"}, {"c.0", "d.0"}),
        ({"exclude": "d.*"}, {"a", "b"}),
        ({"include": "a"}, {"a", "b"}),
        ({"include": "?.0", "exclude": "c.0"}, set()),
    ],
)
def test_a_module_used_twice_is_chosen_by_all_of_its_names(patterns, swapped):
    model = shared()
    report = convert(model, **patterns)
    assert set(report.swapped) == swapped
    assert set(report.left) == {"a", "b", "c.0", "d.0"} - swapped
    assert model["a"] is model["b"]
    for name in ("a", "b", "c.0", "d.0"):
        assert isinstance(model.get_submodule(name), STLLinear if name in swapped else nn.Linear)


@pytest.mark.parametrize("case", ["encoder"], indirect=True)
def test_frozen_weights_stay_frozen(case):
    model = case.build()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    model.layers[1].linear1.bias.requires_grad_(False)
    convert(model, **EXACT)
    assert not any(parameter.requires_grad for parameter in model.layers[0].parameters())
    frozen = {name for name, parameter in model.layers[1].named_parameters() if not parameter.requires_grad}
    assert frozen == {"linear1.bias"}


@pytest.mark.parametrize("placed", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}])
@pytest.mark.parametrize("from_dense", [True, False])
def test_device_dtype_and_mode_are_kept(placed, from_dense):
    model = nn.TransformerEncoderLayer(8, 2, 12, **placed).eval()
    before = next(model.parameters())
    convert(model, from_dense=from_dense)
    assert {(p.device, p.dtype) for p in model.parameters()} == {(before.device, before.dtype)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"basis": "no"}, ["basis='no' is unknown; choose one of", "strassen"]),
        ({"rank": 15}, ["basis='hadamard' has no tile=4 rank=15", "tile=4: rank 16"]),
        ({"tile": 3}, ["tile=3 rank=16", "exists in: causal, frame"]),
        ({"row_axis": "rows"}, ["row_axis='rows' is unknown; choose one of tokens, batch"]),
        ({"include": "blocks.*"}, ["include='blocks.*' matches no linear layer", "layers.0.self_attn"]),
        ({"exclude": ["*.linear1", "head"]}, ["exclude='head' matches no linear layer"]),
        ({"include": "*.linear1", "exclude": "*.norm1"}, ["exclude='*.norm1' matches no linear layer"]),
    ],
)
@pytest.mark.parametrize("case", ["encoder", "encoder, tokens first"], indirect=True)
def test_a_wrong_setting_leaves_the_model_unchanged(bad, said, case):
    model = case.build()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError) as caught:
        convert(model, **bad)
    for text in said:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["encoder, tokens first"], indirect=True)
def test_an_unknown_row_axis_is_named_though_no_attention_is_swapped(case):
    with pytest.raises(SettingError, match="row_axis='rows'"):
        convert(case.build(), exclude="*.self_attn", row_axis="rows")


def test_a_layer_that_cannot_be_built_leaves_the_model_unchanged():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with pytest.raises(SettingError, match="out_features=0"):
        convert(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(4, 4), r"STLLinear\.from_linear"),
        (nn.MultiheadAttention(4, 2), "inside a model"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), "Sequential holds no torch.nn.Linear"),
    ],
)
def test_a_model_without_layers_to_swap_is_refused(model, said):
    with pytest.raises(SettingError, match=said):
        convert(model)


@pytest.mark.parametrize("case", ["encoder"], indirect=True)
def test_converting_again_touches_only_what_is_still_dense(case):
    model = case.build()
    convert(model, include="*.linear?", **INEXACT)
    swapped = model.layers[0].linear1
    report = convert(model, **EXACT)
    assert set(report.swapped) == {"layers.0.self_attn", "layers.1.self_attn"}
    assert model.layers[0].linear1 is swapped
    assert isinstance(model.layers[0].self_attn, STLMultiheadAttention)
    with pytest.raises(SettingError, match="nothing to convert"):
        convert(model)


def test_a_converted_model_trains_and_loads():
    model = small()
    convert(model, tile=2, rank=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = gaussian(8, 5), gaussian(8, 3, seed=1)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = small()
    convert(again, tile=2, rank=4)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
