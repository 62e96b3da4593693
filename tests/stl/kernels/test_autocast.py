"""Programs that were exported, or compiled, with the operators, under autocast."""

import pytest
import torch
from agreement import DEVICE, gaussian
from torch import Tensor, nn

from stl import STLMLP, STLLinear, STLNormLinear


class Added(nn.Module):
    """x + layer(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = STLLinear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


MODULES = {
    "linear": lambda: STLLinear(8, 8),
    "residual": Added,
    "mlp": lambda: STLMLP(STLLinear(8, 5), "silu", STLLinear(5, 8), up=STLLinear(8, 5)),
    "norm": lambda: STLNormLinear(nn.LayerNorm(8), STLLinear(8, 8)),
}


@pytest.fixture(params=MODULES)
def model(request) -> nn.Module:
    """What STL layers are given there is of autocast's dtype, and was of float32 when it was exported."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 8), MODULES[request.param](), nn.Linear(8, 8)).to(DEVICE)
    for module in made.modules():
        if isinstance(module, STLLinear):
            module.backend = "triton"
    return made


def test_an_exported_program_gives_what_the_model_gives(model):
    x = gaussian(2, 5, 8, seed=0).float()
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype):
            y, wanted = exported(x), model(x)
        assert y.dtype == dtype
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("model", ["mlp"], indirect=True)
def test_compiles_without_graph_breaks(model):
    x = gaussian(2, 5, 8, seed=0).float()
    torch.compiler.reset()
    with torch.autocast(DEVICE, torch.bfloat16):
        wanted = model(x)
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, wanted)
    parameters = list(model.parameters())
    for got, exact in zip(*(torch.autograd.grad(out.float().sum(), parameters) for out in (y, wanted)), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=0.02, atol=0.02)
