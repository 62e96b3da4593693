"""Activations as kernels compute them, against float64."""

import pytest
import torch
import triton
import triton.language as tl
from agreement import DEVICE

from stl.kernels.activations import activate
from stl.mlp import ACTIVATIONS


@triton.jit
def _activate(x, y, SIZE: tl.constexpr, NAME: tl.constexpr, BITS: tl.constexpr):
    j = tl.arange(0, SIZE)
    tl.store(y + j, activate(tl.load(x + j), NAME, BITS))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name):
    """A maximum in the interpreter is NumPy's, and hands NaN on by itself; on a GPU, see `test_compile_for_hopper`."""
    x = torch.full((16,), torch.nan, device=DEVICE)
    y = torch.empty_like(x)
    _activate[(1,)](x, y, SIZE=16, NAME=name, BITS=8)
    assert y.isnan().all()


@pytest.mark.parametrize("bits", [8, 11, 24])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_as_exact_as_documented(name, bits):
    """GELU for 16 bits is fitted, for bf16 to 3.9e-5, for fp16 to 3.1e-6; besides there is the rounding of float32."""
    x = torch.linspace(-8, 8, 4096, device=DEVICE)
    y = torch.empty_like(x)
    _activate[(1,)](x, y, SIZE=4096, NAME=name, BITS=bits)
    fitted = {8: 3.9e-5, 11: 3.1e-6}.get(bits, 0) if name == "gelu" else 0
    torch.testing.assert_close(y.double(), ACTIVATIONS[name](x.double()), rtol=1e-6, atol=5e-7 + fitted)
