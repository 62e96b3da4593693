"""Sparse24Linear: the mask, the gradient of SR-STE, and that training leaves two of four."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from models.sparse24 import Sparse24Linear, input_norms, two_of_four
from stl import SettingError


@given(st.integers(1, 5).flatmap(lambda m: st.integers(1, 15).map(lambda k: (m, k))), st.data())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_two_of_four_are_the_largest_of_equal_ones_the_first(shape, data):
    weight = torch.from_numpy(data.draw(arrays("float32", shape, elements=st.sampled_from([-2, -1, 0, 1, 2]))))
    for row, kept in zip(weight.tolist(), two_of_four(weight).tolist(), strict=True):
        whole = len(row) // 4 * 4
        for start in range(0, whole, 4):
            places = sorted(range(start, start + 4), key=lambda place: -abs(row[place]))[:2]
            assert [place for place in range(start, start + 4) if kept[place]] == sorted(places)
        assert all(kept[whole:])


@pytest.mark.parametrize(("k", "m"), [(147, 192), (256, 200)])
def test_the_layer_is_its_pruned_matrix(k, m):
    torch.manual_seed(0)
    layer, x = Sparse24Linear(k, m).double(), torch.randn(2, 6, k, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    pruned = layer.weight * two_of_four(layer.weight)
    assert pruned.ne(0).sum() == m * (k // 4 * 2 + k % 4)
    torch.testing.assert_close(layer(x), x @ pruned.T + layer.bias)


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.5])
def test_the_gradient_goes_straight_through_and_what_is_pruned_decays(decay):
    torch.manual_seed(0)
    layer, x = Sparse24Linear(11, 5, decay=decay).double(), torch.randn(7, 11, dtype=torch.float64)
    (got,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    mask = two_of_four(layer.weight)
    pruned = (layer.weight * mask).detach().requires_grad_()
    (of_pruned,) = torch.autograd.grad(F.linear(x, pruned, layer.bias).square().sum(), pruned)
    assert of_pruned[~mask].ne(0).all()  # straight through: pruned weights learn too
    torch.testing.assert_close(got, of_pruned + decay * ~mask * layer.weight)


def test_the_mask_follows_the_weight():
    layer = Sparse24Linear(4, 1, bias=False, decay=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    x = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=3.0)
    assert layer(x).item() == 7
    layer(x).sum().backward()
    optimizer.step()  # to 1, 0, -1, 4: the last, pruned till now, is the largest; of equal ones the first stays
    assert layer(x).item() == 1 - 4


@pytest.mark.parametrize("pruning", ["magnitude", "wanda"])
def test_a_fixed_mask_stays_as_it_was_chosen(pruning):
    torch.manual_seed(0)
    layer, dense, x = (
        Sparse24Linear(10, 6, decay=0.5, pruning=pruning, fixed_mask=True),
        nn.Linear(10, 6),
        torch.randn(9, 10),
    )
    layer.load_dense(dense.weight, dense.bias, torch.rand(10) if pruning == "wanda" else None)
    pruned = layer.weight.eq(0)
    assert pruned.sum() == 6 * 2 * 2
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        assert layer.weight.grad[pruned].eq(0).all()
        optimizer.step()
    assert torch.equal(layer.weight.eq(0), pruned)
    assert torch.equal(layer.pruned(), layer.weight)
    assert not torch.allclose(layer.weight[~pruned], dense.weight[~pruned])


def test_a_fixed_mask_of_a_layer_that_is_drawn():
    layer = Sparse24Linear(8, 4, fixed_mask=True)
    assert layer.weight.eq(0).sum() == 4 * 2 * 2
    assert torch.equal(layer.pruned(), layer.weight)


def test_wanda_keeps_what_is_large_with_its_input():
    """Equation (1) of arXiv 2306.11695, row by row, and the gradient through that mask."""
    torch.manual_seed(0)
    dense, x = (
        nn.Linear(12, 5).double(),
        torch.randn(3, 7, 12, dtype=torch.float64) * torch.logspace(-2, 2, 12).double(),
    )
    norms = input_norms(dense, {"it": dense}, [x[:1], x[1:]])["it"]
    torch.testing.assert_close(norms.double(), x.flatten(0, 1).norm(dim=0))
    layer = Sparse24Linear(12, 5, decay=0.1, pruning="wanda").double()
    layer.load_dense(dense.weight, dense.bias, norms)
    scores = (dense.weight.abs() * x.flatten(0, 1).norm(dim=0)).unflatten(1, (3, 4))
    mask = (scores >= scores.topk(2, -1).values[..., -1:]).flatten(1)
    assert not torch.equal(mask, two_of_four(dense.weight))
    torch.testing.assert_close(layer(x), F.linear(x, dense.weight * mask, dense.bias))
    (got,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(got, x.sum((0, 1)).expand(5, -1) + 0.1 * ~mask * layer.weight)
    other = Sparse24Linear(12, 5, pruning="wanda").double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_one_shot_pruning_by_magnitude_starts_from_the_dense_weight():
    dense, layer = nn.Linear(8, 4), Sparse24Linear(8, 4)
    layer.load_dense(dense.weight, dense.bias)
    assert torch.equal(layer.pruned(), dense.weight * two_of_four(dense.weight))
    assert torch.equal(layer.bias, dense.bias)
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(SettingError, match="pruning='magnitude' needs no calibration data"):
        layer.load_dense(dense.weight, None, torch.ones(8))
    with pytest.raises(SettingError, match="pruning='wanda' needs calibration data"):
        Sparse24Linear(8, 4, pruning="wanda").load_dense(dense.weight)
