"""MonarchLinear: the number of its blocks, and the matrix it is."""

from math import ceil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.monarch import MonarchLinear

few = settings(deadline=None, derandomize=True, max_examples=50)


def macs(k: int, m: int, blocks: int) -> int:
    p, q = ceil(k / blocks), ceil(m / blocks)
    return blocks * min(p, q) * (p + q)


@given(k=st.integers(1, 300), m=st.integers(1, 300), factor=st.floats(1, 20))
@few
def test_the_blocks_are_the_fewest_within_the_budget_or_the_cheapest(k, m, factor):
    layer = MonarchLinear(k, m, factor=factor)
    assert layer.macs((1, k)) == macs(k, m, layer.blocks)
    costs = [macs(k, m, blocks) for blocks in range(1, max(k, m) + 1)]
    fitting = [cost <= k * m / factor for cost in costs]
    assert layer.blocks == 1 + (fitting.index(True) if any(fitting) else costs.index(min(costs)))


def columns_first(rows: int, columns: int) -> Tensor:
    """The permutation matrix that reads a vector as rows, and writes it by columns."""
    order = [row * columns + column for column in range(columns) for row in range(rows)]
    return torch.eye(rows * columns, dtype=torch.float64)[order]


@given(k=st.integers(1, 40), m=st.integers(1, 40), factor=st.sampled_from([1.0, 2.0, 2.667, 4.0]))
@example(k=147, m=192, factor=2.667)
@example(k=256, m=200, factor=2.667)
@few
def test_the_layer_is_its_dense_matrix(k, m, factor):
    torch.manual_seed(0)
    layer = MonarchLinear(k, m, factor=factor).double()
    torch.nn.init.normal_(layer.bias)
    blocks, s, _ = layer.first.shape
    q = layer.second.shape[1]
    right, left = torch.block_diag(*layer.first), torch.block_diag(*layer.second)
    whole = columns_first(blocks, q) @ left @ columns_first(blocks, s) @ right
    x = torch.randn(2, 3, k, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ whole[:m, :k].T + layer.bias)


@pytest.mark.parametrize(("k", "m"), [(256, 256), (147, 192), (512, 256)])
def test_every_output_sees_every_input(k, m):
    assert MonarchLinear(k, m, bias=False)(torch.eye(k)).ne(0).all()
