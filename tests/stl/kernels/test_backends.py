"""What computes an STLMLP and an STLNormLinear is what its layers, or it, are told."""

import pytest
import torch
from agreement import DEVICE, gaussian
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, SettingError, STLLinear, STLNormLinear, kernels, stl_linear

MODULES = {
    "mlp": lambda: STLMLP(STLLinear(8, 5), "gelu", STLLinear(5, 8)),
    "norm": lambda: STLNormLinear(nn.LayerNorm(8), STLLinear(8, 8)),
}
WIDTHS = {"narrow": 256, "too wide for one program": 1}


@pytest.fixture(params=MODULES)
def module(request) -> STLMLP | STLNormLinear:
    return MODULES[request.param]().to(DEVICE)


def operators(module: nn.Module) -> set[str]:
    """Those of the kernels that a call takes."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(gaussian(2, 3, 8, seed=0).float())
    return {str(name) for name in counter.get_flop_counts()["Global"] if str(name).startswith("stl")}


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_set_computes_it(module, width, monkeypatch):
    monkeypatch.setattr("stl.kernels.MOST_NORMALISED_TILES", {4: 2 * (WIDTHS[width],)})
    assert module.backend == "auto"
    for backend, taken in (("triton", True), ("torch", False)):
        module.backend = backend
        assert module.backend == backend
        assert bool(operators(module)) == taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_auto_is_the_reference_for_shapes_alone_of_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with FakeTensorMode():
        x, weight, matrix = (torch.empty(sizes, device="cuda") for sizes in ((4096, 4096, 64), (16, 16, 16), (16, 16)))
        assert stl_linear(x, weight, matrix, matrix).shape == (4096, 4096, 64)
        with pytest.raises(SettingError, match=r"^backend='triton' needs a GPU, and there is none"):
            stl_linear(x, weight, matrix, matrix, backend="triton")


def test_layers_that_are_told_for_themselves():
    mlp = MODULES["mlp"]().to(DEVICE)
    mlp.fc1.backend = mlp.fc2.backend = "triton"
    assert mlp.backend == "triton"
    assert "stl.hidden_gemm" in operators(mlp)
    mlp.fc1.backend = "torch"
    assert mlp.backend == "mixed"
    assert operators(mlp) == {"stl.encode_gemm", "stl.decode"}
    mlp.backend = "torch"
    assert not operators(mlp)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_unknown_one_gets_one_line(module, width, monkeypatch):
    monkeypatch.setattr("stl.kernels.MOST_NORMALISED_TILES", {4: 2 * (WIDTHS[width],)})
    module.backend = "foo"
    with pytest.raises(SettingError, match=r"^backend='foo' is unknown; choose one of auto, torch, triton$"):
        operators(module)
