"""LowRankLinear: the rank it takes, and the matrix it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.low_rank import LowRankLinear


@given(k=st.integers(1, 300), m=st.integers(1, 300), factor=st.floats(1, 20))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_rank_is_the_largest_within_the_budget(k, m, factor):
    rank, budget = LowRankLinear(k, m, factor=factor).rank, k * m / factor
    assert rank == 1 or rank * (k + m) <= budget
    assert (rank + 1) * (k + m) > budget


@pytest.mark.parametrize(("k", "m"), [(147, 192), (256, 200), (3, 5)])
def test_the_layer_is_its_dense_matrix(k, m):
    torch.manual_seed(0)
    layer, x = LowRankLinear(k, m).double(), torch.randn(2, 6, k, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), x @ (layer.outer @ layer.inner).T + layer.bias)
