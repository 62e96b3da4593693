"""Sums of shares against float64."""

import pytest
import torch
from agreement import DEVICE

from stl.kernels.shares import add_up


@pytest.mark.parametrize("shape", [(1, 3), (2, 16, 16), (300, 7, 4), (1408, 16, 16), (513, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_share_is_added_once(shape, dtype):
    shares = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    total = add_up(shares, dtype)
    assert (total.dtype, total.shape) == (dtype, shape[1:])
    torch.testing.assert_close(
        total, shares.double().sum(0).to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0)])
def test_no_shares_are_zeros(shape):
    total = add_up(torch.empty(shape, device=DEVICE), torch.float32)
    assert torch.equal(total, torch.zeros(shape[1:], device=DEVICE))
