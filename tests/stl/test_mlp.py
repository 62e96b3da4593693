"""`STLMLP` without kernels, and which modules `fuse_mlps` takes for one."""

from collections import OrderedDict
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp
from torch import Tensor, nn

import models  # noqa: F401  timm knows them from here on
from stl import STLMLP, SettingError, STLLinear, convert, count_flops, fuse_mlps

stl = partial(STLLinear, tile=2, rank=4)


class Functional(nn.Module):
    """By functions, and under other names."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.up, self.down, self.activation = stl(6, 8), stl(8, 6), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Gated(nn.Module):
    """As LLaMA's."""

    def __init__(self, activation=F.silu, gate_first: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = stl(6, 8, bias), stl(6, 8, bias), stl(8, 6, bias)
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.activation(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(gate * up if self.gate_first else torch.mul(up, gate))


class Halves(nn.Module):
    """As Phi-3's, or by these slices."""

    def __init__(self, first: slice | None = None, second: slice | None = None) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = stl(6, 16, False), stl(8, 6, False)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        gate, up = both.chunk(2, dim=-1) if self.first is None else (both[..., self.first], both[..., self.second])
        return self.down_proj(up * F.silu(gate))


class HalvesByShape(Halves):
    """Where they are is computed."""

    def forward(self, x: Tensor) -> Tensor:
        both, features = self.gate_up_proj(x), x.shape[-1]
        return self.down_proj(F.silu(both[..., :features]) * both[..., features:])


class HalvesAgain(Halves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate_up_proj(x)[..., :6]


class GatedByItself(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * gate)


class GatedByInput(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x + 1))


class GatedTwice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.activation(self.up_proj(x)))


class DropsOut(Functional):
    """As a function, in training only, or always."""

    always = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.dropout(y, 0.5) if self.training or self.always else y


class AlwaysDropsOut(DropsOut):
    always = True


class InFloat32(Functional):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class WithoutGradients(Functional):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class TakesMore(Functional):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x)


class Subclass(STLLinear):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, residual)


def changed(change) -> nn.Module:
    module = Functional(F.gelu)
    change(module)
    return module


class Residual(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Twice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up(x))
        return self.down(hidden) + hidden.sum()


class Depends(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def sequential(*steps: nn.Module) -> nn.Module:
    return nn.Sequential(stl(6, 8), *steps, stl(8, 6))


CHAINS = {
    "gelu": sequential(nn.GELU()),
    "tanh": sequential(nn.GELU(approximate="tanh")),
    "relu, no dropout": sequential(nn.ReLU(), nn.Dropout(0.0), nn.Identity()),
    "silu, then dropout": nn.Sequential(stl(6, 8), nn.SiLU(), stl(8, 6), nn.Dropout(0.3)),
    "named": nn.Sequential(OrderedDict(a=stl(6, 8), b=nn.GELU(), c=stl(8, 6))),
    "function": Functional(F.gelu),
    "function, relu": Functional(torch.relu),
    "gated": Gated(),
    "gated, the other way round": Gated(nn.GELU(), gate_first=False, bias=True),
    "gated by halves": Halves(),
    "gated by slices": Halves(slice(8), slice(8, None)),
}


def timm_mlp(kind: type[nn.Module], **settings) -> nn.Module:
    module = kind(6, 8, **settings)
    convert(module, tile=2, rank=4)
    return module


OTHERS = {
    "residual": Residual(F.gelu),
    "hidden used twice": Twice(F.gelu),
    "depends on numbers": Depends(F.gelu),
    "always drops out": AlwaysDropsOut(F.gelu),
    "without autocast": InFloat32(F.gelu),
    "without gradients": WithoutGradients(F.gelu),
    "takes more than x": TakesMore(F.gelu),
    "a hook": changed(lambda module: module.register_forward_hook(lambda *_: None)),
    "a hook of a layer": changed(lambda module: module.up.register_forward_hook(lambda *_: None)),
    "a patched forward": changed(lambda module: setattr(module, "forward", lambda x: x)),
    "a buffer of its own": changed(lambda module: module.register_buffer("scale", torch.ones(1))),
    "layers of two backends": changed(lambda module: setattr(module.up, "backend", "torch")),
    "a layer of another class": changed(lambda module: setattr(module, "down", Subclass(8, 6, tile=2, rank=4))),
    "dropout in between": sequential(nn.GELU(), nn.Dropout(0.1)),
    "norm in between": sequential(nn.GELU(), nn.LayerNorm(8)),
    "another activation": sequential(nn.Tanh()),
    "two activations": sequential(nn.GELU(), nn.ReLU()),
    "no activation": sequential(),
    "activation behind": nn.Sequential(stl(6, 8), stl(8, 6), nn.GELU()),
    "another tile": nn.Sequential(stl(6, 8), nn.GELU(), STLLinear(8, 6, tile=4, rank=16)),
    "another row axis": nn.Sequential(stl(6, 8), nn.GELU(), stl(8, 6, row_axis="batch")),
    "three layers": nn.Sequential(stl(6, 8), nn.GELU(), stl(8, 6), nn.GELU(), stl(6, 6)),
    "one layer": nn.Sequential(stl(6, 8), nn.GELU(), nn.Linear(8, 6)),
    "gated halves of another activation": timm_mlp(GluMlp, gate_last=False),
    "the other half activated": timm_mlp(GluMlp, act_layer=nn.SiLU),
    "no halves": Halves(slice(8), slice(7, 15)),
    "halves in the other order": Halves(slice(8, 16), slice(0, 8)),
    "halves used again": HalvesAgain(),
    "halves whose sizes are computed": HalvesByShape(),
    "gated by itself": GatedByItself(),
    "gated by another input": GatedByInput(),
    "gated twice": GatedTwice(),
}


TIMMS = [timm_mlp(Mlp), timm_mlp(Mlp, act_layer=nn.SiLU), timm_mlp(GluMlp, act_layer=nn.SiLU, gate_last=False)]


@pytest.mark.parametrize("module", [*CHAINS.values(), *TIMMS])
def test_an_mlp_is_found_and_stays_what_it_was(module):
    model = nn.Sequential(nn.LayerNorm(6), module).eval()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    wanted, names = model(x), list(model.state_dict())
    assert fuse_mlps(model) == ["1"]
    assert isinstance(model[1], STLMLP)
    assert not model[1].training
    assert torch.equal(model(x), wanted)
    assert list(model.state_dict()) == names
    assert fuse_mlps(model) == []


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_is_left_alone(name):
    model = nn.Sequential(OTHERS[name])
    assert fuse_mlps(model) == []
    assert model[0] is OTHERS[name]


def test_dropout_behind_the_layers_stays():
    model = nn.Sequential(nn.Sequential(stl(6, 8), nn.GELU(), stl(8, 6), nn.Dropout(0.5)))
    fuse_mlps(model)
    assert model[0].dropout == 0.5
    assert (model(torch.ones(4, 5, 6)) == 0).any()
    assert (model.eval()(torch.ones(4, 5, 6)) != 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_by_a_function_stays(training):
    model = nn.Sequential(DropsOut(F.gelu)).train(training)
    assert fuse_mlps(model) == ["0"]
    assert (model.train()(torch.ones(4, 5, 6)) == 0).any()
    assert (model.eval()(torch.ones(4, 5, 6)) != 0).all()


def test_the_backend_of_the_layers_is_that_of_the_mlp():
    model = nn.Sequential(sequential(nn.GELU()))
    for layer in model.modules():
        if isinstance(layer, STLLinear):
            layer.backend = "torch"
    fuse_mlps(model)
    assert model[0].backend == "torch"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: timm.create_model("t2t_vit_tiny"), 5),
        (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), 2),
    ],
)
def test_every_mlp_of_a_vision_transformer(make, found):
    model = make().eval()
    convert(model, rank=16)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted, report, names = model(x), count_flops(model, (3, 32, 32)), list(model.state_dict())
    assert len(fuse_mlps(model)) == found
    assert torch.equal(model(x), wanted)
    assert count_flops(model, (3, 32, 32)) == report
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("first", "activation", "second", "said"),
    [
        (stl(6, 8), "tanh", stl(8, 6), "activation='tanh' is unknown; choose one of gelu, gelu_tanh, relu, silu"),
        (nn.Linear(6, 8), "gelu", stl(8, 6), r"^Linear is no STLLinear; STLLinear\.from_linear"),
        (stl(6, 8), "gelu", nn.Linear(8, 6), r"^Linear is no STLLinear; STLLinear\.from_linear"),
        (stl(6, 8), "gelu", stl(9, 6), "sizes, tiles and row axes must agree"),
        (stl(6, 8), "gelu", STLLinear(8, 6), "sizes, tiles and row axes must agree"),
    ],
)
def test_layers_that_do_not_fit_get_one_line(first, activation, second, said):
    with pytest.raises(SettingError, match=said):
        STLMLP(first, activation, second)


def test_an_up_that_does_not_fit_gets_one_line():
    with pytest.raises(SettingError, match=r"and .* sizes, tiles and row axes must agree"):
        STLMLP(stl(6, 8), "silu", stl(8, 6), up=stl(5, 8))
    with pytest.raises(SettingError, match=r"^Linear is no STLLinear"):
        STLMLP(stl(6, 8), "silu", stl(8, 6), up=nn.Linear(6, 8))
    with pytest.raises(SettingError, match="must be 3, one for each layer"):
        STLMLP(stl(6, 8), "silu", stl(8, 6), ("a", "b"), up=stl(6, 8))


def test_halves_that_do_not_fit_get_one_line():
    with pytest.raises(SettingError, match=r"cannot follow the halves of STLLinear.*sizes, tiles and row axes"):
        STLMLP(stl(6, 14), "silu", stl(8, 6), halves=True)
    with pytest.raises(SettingError, match=r"^halves of 7 features are no whole tiles of 2; give first and up apart$"):
        STLMLP(stl(6, 14), "silu", stl(7, 6), halves=True)
    with pytest.raises(SettingError, match=r"^halves=True takes up from the first layer; give one of the two$"):
        STLMLP(stl(6, 16), "silu", stl(8, 6), up=stl(6, 16), halves=True)
