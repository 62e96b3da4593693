import pytest
import torch

from stl.kernels.weight_gradient import PARTS, ROWS_OF_A_PART, weight_gradient

ENOUGH = PARTS * ROWS_OF_A_PART


@pytest.mark.parametrize("rows", [0, 24, ENOUGH, ENOUGH + PARTS, ENOUGH + 1])
def test_it_is_one_product_whatever_parts_it_is_taken_in(rows):
    generator = torch.Generator().manual_seed(rows)
    channels, gradient = (torch.randn(2, rows, size, generator=generator) for size in (5, 3))
    wanted = torch.einsum("rpk,rpm->rkm", channels.double(), gradient.double())
    for of in (gradient, gradient.mT.contiguous().mT):  # of any strides
        torch.testing.assert_close(weight_gradient(channels, of).double(), wanted, rtol=1e-4, atol=2e-3)
