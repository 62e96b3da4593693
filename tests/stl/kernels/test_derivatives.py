"""Derivatives that the kernels do not have: "auto" leaves them to the reference, "triton" says so."""

import pytest
import torch
from agreement import DEVICE, gaussian
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from stl import STLMLP, SettingError, STLLinear, STLNormLinear, kernels


def dual(function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


TRANSFORMS = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,))[1],
    "dual numbers": dual,
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x),
}
MODULES = {
    "linear": lambda: STLLinear(7, 6),
    "mlp": lambda: STLMLP(STLLinear(7, 5), "gelu", STLLinear(5, 6)),
    "norm": lambda: STLNormLinear(nn.RMSNorm(7), STLLinear(7, 6)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_triton_refuses_what_it_would_compute_wrongly(transform):
    layer, x = STLLinear(7, 6).to(DEVICE), gaussian(2, 5, 7, seed=0).float()
    assert TRANSFORMS[transform](layer, x).norm() > 0
    layer.backend = "triton"
    with pytest.raises(
        SettingError, match=r"^backend='triton' has no .* transforms of torch\.func; use backend='auto'$"
    ):
        TRANSFORMS[transform](layer, x)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_auto_leaves_it_to_the_reference(transform, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    with FakeTensorMode():  # of a GPU that need not be there
        large = torch.empty(2**26, dtype=torch.bfloat16, device="cuda")
    taken = []

    def function(x: Tensor) -> Tensor:
        taken.append(kernels.use_triton("auto", large, 4, 16))
        return x.sin()

    function(torch.ones(3))
    TRANSFORMS[transform](function, torch.ones(3))
    assert taken == [True, False]


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_gradients_are_refused(name):
    module, x = MODULES[name]().to(DEVICE), gaussian(2, 5, 7, seed=0).float().requires_grad_()
    module.backend = "triton"
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(SettingError, match="the kernels have no gradients of gradients; use backend='torch'"):
        gradient.sum().backward()
