"""train_weight="dense": STL layers as functions of a dense weight."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stl import SettingError, STLLinear, convert, count_flops, encode_weights, fuse_mlps

EXACT = [("strassen", 2, 7), ("exact48", 4, 48), ("strassen", 4, 49)]
OTHERS = [("hadamard", 4, 16), ("frame", 4, 24), ("causal", 4, 16), ("random", 3, 11), ("products", 2, 8)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(basis: tuple[str, int, int], k: int = 7, m: int = 5) -> tuple[nn.Linear, STLLinear]:
    """A dense layer and one that trains its weight."""
    torch.manual_seed(0)
    name, tile, rank = basis
    dense = nn.Linear(k, m).double()
    more = {"train_basis": False, "train_weight": "dense"}
    return dense, STLLinear.from_linear(dense, basis=name, tile=tile, rank=rank, **more)


@given(k=st.integers(1, 13), m=st.integers(1, 13), basis=st.sampled_from(EXACT + OTHERS))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_it_computes_what_the_encoded_weight_does(k, m, basis):
    dense, made = pair(basis, k, m)
    name, tile, rank = basis
    plain = STLLinear.from_linear(dense, basis=name, tile=tile, rank=rank)
    torch.testing.assert_close(made(gaussian(2, 6, k)), plain(gaussian(2, 6, k)))
    torch.testing.assert_close(made.dense_weight, dense.weight.T)
    assert {name: p.shape for name, p in made.named_parameters()} == {
        "bias": (m,),
        "dense_weight": (k, m),
    }


@pytest.mark.parametrize("basis", EXACT)
def test_an_exact_basis_learns_what_a_dense_layer_learns(basis):
    layers = pair(basis)
    x, target = gaussian(3, 6, 7), gaussian(3, 6, 5, seed=1)
    for layer in layers:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
    dense, made = layers
    torch.testing.assert_close(made.dense_weight, dense.weight.T)
    torch.testing.assert_close(made(x), dense(x))


def test_a_fresh_weight_has_the_variance_that_is_asked_for():
    torch.manual_seed(0)
    made = STLLinear(256, 256, train_weight="dense")
    made.reset_parameters(std=0.5)
    assert made(torch.randn(4, 64, 256)).std().item() == pytest.approx(0.5 * 16, rel=0.05)


def test_encode_weights_leaves_plain_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double()
    convert(model, from_dense=True, train_weight="dense")
    assert "train_weight='dense'" in str(model)
    like = plain()
    x = gaussian(2, 4, 8)
    before, macs = model(x), count_flops(model, (2, 4, 8)).total
    copied = copy.deepcopy(model)
    assert encode_weights(model) == ["0", "2"]
    assert encode_weights(model) == []
    torch.testing.assert_close(copied(x), before)
    assert copied[0].train_weight == "dense"
    model(x).sum().backward()
    torch.testing.assert_close(model(x), before)
    assert count_flops(model, (2, 4, 8)).total == macs
    like.load_state_dict(model.state_dict())
    torch.testing.assert_close(like(x), before)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in like.named_parameters()}


def plain() -> nn.Module:
    made = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double()
    convert(made)
    return made


def test_checkpoints_copies_and_the_compiler():
    _, made = pair(("hadamard", 4, 16))
    x = gaussian(2, 6, 7)
    other = pair(("hadamard", 4, 16))[1]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(x), made(x))
    torch.testing.assert_close(copy.deepcopy(made)(x), made(x))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_mlps_are_fused():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))).double()
    convert(model, from_dense=True, train_weight="dense")
    x = gaussian(2, 4, 8)
    before = model(x)
    assert fuse_mlps(model) == ["0"]
    torch.testing.assert_close(model(x), before)


def test_on_the_meta_device_and_filled_there():
    made = STLLinear(8, 8, basis="exact48", rank=48, train_weight="dense", device="meta")
    assert made(torch.empty(2, 4, 8, device="meta")).shape == (2, 4, 8)
    filled, known = made.to_empty(device="cpu"), STLLinear(8, 8, basis="exact48", rank=48, train_weight="dense")
    filled.load_state_dict(known.state_dict())
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(filled(x), known(x))


@pytest.mark.parametrize("ours", ["dense", "encoded"])
def test_a_checkpoint_of_the_other_kind_is_one_line(ours):
    theirs = {"dense": "encoded", "encoded": "dense"}[ours]
    said = f"the checkpoint has train_weight={theirs!r}, the model train_weight={ours!r}; convert it alike"
    with pytest.raises(RuntimeError, match=said):
        STLLinear(8, 8, train_weight=ours).load_state_dict(STLLinear(8, 8, train_weight=theirs).state_dict())


def test_frozen_layers_stay_frozen():
    dense = nn.Linear(8, 8)
    dense.weight.requires_grad_(False)
    made = STLLinear.from_linear(dense, train_weight="dense")
    assert [name for name, parameter in made.named_parameters() if parameter.requires_grad] == ["bias"]


def test_under_autocast_the_weight_is_encoded_in_its_own_precision():
    made = STLLinear(8, 8, basis="exact48", rank=48, train_weight="dense")
    with torch.autocast("cpu", torch.bfloat16):
        assert made.encoded_weight().dtype == torch.float32
        assert made(torch.randn(2, 4, 8)).dtype == torch.bfloat16


def test_errors_are_one_line():
    with pytest.raises(SettingError, match=r"^train_weight='foo' is unknown; choose one of encoded, dense$"):
        STLLinear(8, 8, train_weight="foo")
    with pytest.raises(SettingError, match=r"^calibration with train_weight='dense' fits encoded weights, [^\n]*$"):
        convert(
            nn.Sequential(nn.Linear(8, 8)), from_dense=True, train_weight="dense", calibration=[torch.randn(2, 4, 8)]
        )
