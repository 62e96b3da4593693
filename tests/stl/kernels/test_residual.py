"""A residual that the decode adds, and a norm before an MLP, by kernels against the reference in float64: on the GPU
where there is one, else in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from agreement import DEVICE, assert_agree, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, SettingError, STLLinear, stl_linear
from stl.normalisation import Norm

# How a residual of some shape lies in memory: the shape of what it is cut from, and the cut.
LAYOUTS: dict[str, tuple[Callable[[tuple], tuple], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda shape: shape, lambda base: base),
    "every other feature": (lambda shape: (*shape[:-1], 2 * shape[-1]), lambda base: base[..., 1::2]),
    "features first": (lambda shape: shape[::-1], lambda base: base.permute(*range(base.ndim)[::-1])),
    "one row for all": (lambda shape: (1,) * (len(shape) - 1) + shape[-1:], lambda base: base),
}


class Added(nn.Module):
    """layer(norm(x), residual), whose gradient is then looked at as that of a parameter is."""

    backend = "auto"

    def __init__(
        self, layer: STLLinear | STLMLP, shape: tuple[int, ...], layout: str = "contiguous", norm: bool = False
    ) -> None:
        super().__init__()
        base, self.cut = LAYOUTS[layout]
        self.layer, self.shape = layer.double().to(DEVICE), shape
        self.residual = nn.Parameter(gaussian(*base(shape), seed=5))
        features = layer.layers[0].in_features if isinstance(layer, STLMLP) else layer.in_features
        self.gain = nn.Parameter(1 + gaussian(features, seed=6)) if norm else None
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.backend = self.backend
        norm = () if self.gain is None else (Norm(self.gain, self.gain / 2, 1e-5, True),)
        return self.layer(x, self.cut(self.residual).expand(self.shape), *norm)


def mlp(k: int, m: int, up: bool = False, dropout: float = 0.0) -> STLMLP:
    first, gate, second = STLLinear(k, 9), STLLinear(k, 9), STLLinear(9, m, rank=24, basis="frame")
    return STLMLP(first, "gelu", second, dropout=dropout, up=gate if up else None)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    sizes=st.tuples(*[st.integers(1, 11)] * 3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    tile_and_rank=st.sampled_from([(2, 7), (4, 16), (4, 33), (8, 64)]),
    bias=st.booleans(),
    row_axis=st.sampled_from(["tokens", "batch"]),
)
@settings(deadline=None, derandomize=True, max_examples=6)
def test_any_size_and_layout(lead, sizes, layout, tile_and_rank, bias, row_axis):
    torch.manual_seed(0)
    n, k, m = sizes
    tile, rank = tile_and_rank
    layer = STLLinear(k, m, bias, tile=tile, rank=rank, basis="random", row_axis=row_axis)
    assert_agree(Added(layer, (*lead, n, m), layout), gaussian(*lead, n, k, seed=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    torch.manual_seed(0)
    assert_agree(Added(STLLinear(7, 6), (3, 5, 6), layout), gaussian(3, 5, 7, seed=0))


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_where_rows_of_tiles_are_side_by_side(layout, n, together):
    torch.manual_seed(0)
    assert_agree(Added(STLLinear(96, 160), (16, n, 160), layout), gaussian(16, n, 96, seed=0))
    assert set(together) == {8, 16}


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 0, 7)])
def test_lone_rows_and_no_rows(shape):
    torch.manual_seed(0)
    assert_agree(Added(STLLinear(7, 6), (*shape[:-1], 6)), gaussian(*shape, seed=0))
    assert_agree(Added(mlp(7, 6), (*shape[:-1], 6)), gaussian(*shape, seed=0))


@pytest.mark.parametrize("up", [False, True])
def test_an_mlp_between_norm_and_residual(up):
    torch.manual_seed(0)
    assert_agree(Added(mlp(7, 6, up), (2, 5, 6), "features first", norm=True), gaussian(2, 5, 7, seed=0) + 1)


def test_the_norm_of_an_mlp_that_is_too_wide_for_one_program(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("stl.kernels.MOST_NORMALISED_TILES", {4: (1, 1)})
    assert_agree(Added(mlp(7, 6), (2, 5, 6), norm=True), gaussian(2, 5, 7, seed=0) + 1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dropout_leaves_the_residual(backend):
    module = mlp(7, 6, dropout=0.5).to(DEVICE)
    module.backend = backend
    x, residual = gaussian(2, 9, 7, seed=0).float(), gaussian(2, 9, 6, seed=1).float()
    dropped = (module(x, residual) == residual).float().mean()
    assert 0.2 < dropped < 0.8


@pytest.mark.parametrize("make", [lambda: STLLinear(7, 6), lambda: mlp(7, 6)])
def test_under_autocast_the_residual_and_the_sum_stay_float32(make):
    torch.manual_seed(0)
    layer = make().to(DEVICE)
    x, residual = (gaussian(2, 5, k, seed=k).float().requires_grad_() for k in (7, 6))
    large = residual + 300  # where bf16 has steps of 2
    results = {}
    for backend in ("torch", "triton"):
        layer.backend = backend
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x, large)
        gradients = torch.autograd.grad(y, [x, residual, *layer.parameters()], gaussian(2, 5, 6, seed=3).float())
        assert {tensor.dtype for tensor in (y, *gradients)} == {torch.float32}
        results[backend] = y - large, *gradients
    for got, wanted in zip(results["triton"], results["torch"], strict=True):
        assert (got - wanted).norm() <= 0.03 * wanted.norm()
    assert torch.equal(results["triton"][2], gaussian(2, 5, 6, seed=3).float())


def test_the_gradient_of_the_bias_is_summed_before_rounding():
    layer = STLLinear(7, 6).to(DEVICE)
    layer.backend = "triton"
    x, residual = gaussian(2, 4, 7, seed=0).float(), gaussian(2, 4, 6, seed=1).float()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x, residual)
    gradient = torch.tensor([1 + 2**-10, -1], device=DEVICE)[:, None, None].expand(2, 4, 6)  # in bf16 ±1
    (dbias,) = torch.autograd.grad(y, layer.bias, gradient)
    assert torch.equal(dbias, torch.full_like(dbias, 4 * 2**-10))


def test_a_less_precise_residual_is_added_before_rounding():
    layer = STLLinear(7, 6).to(DEVICE)
    x, residual = gaussian(2, 5, 7, seed=0).float(), gaussian(2, 5, 6, seed=1).bfloat16().requires_grad_()
    layer.backend = "triton"
    y = layer(x, residual)
    torch.testing.assert_close(y, layer(x) + residual)
    (gradient,) = torch.autograd.grad(y.sum(), residual)
    assert gradient.dtype == torch.bfloat16
    low = layer.bfloat16()(x.bfloat16(), residual)
    assert low.dtype == torch.bfloat16


def test_a_residual_of_float64_stays_as_precise():
    layer = STLLinear(7, 6).to(DEVICE)
    layer.backend = "triton"
    x = gaussian(2, 5, 7, seed=0).float()
    residual = (gaussian(2, 6, 5, seed=1) * 1e12).mT.requires_grad_()
    y = layer(x, residual)
    assert y.dtype == torch.float64
    assert torch.equal(y, layer(x).double() + residual)
    (gradient,) = torch.autograd.grad(y.sum(), residual)
    assert torch.equal(gradient, torch.ones_like(residual))


def test_channels_of_any_layout():
    decoder, bias = gaussian(16, 16, seed=1).float(), gaussian(6, seed=2).float()
    plain = gaussian(16, 4, 2, seed=0).float()
    mixed = plain.mT.contiguous().mT
    results = []
    for channels in (plain, mixed):
        y = torch.ops.stl.decode(channels, decoder, bias, None, 2, 5, 6, False)
        gated = (channels, decoder, bias, channels, decoder, bias, decoder, gaussian(16, 2, 3, seed=3).float())
        results.append((y, torch.ops.stl.hidden_gemm(*gated, "silu", 2, 5, 6)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_operator_keeps_the_rules_of_pytorch():
    torch.manual_seed(0)
    layer = STLLinear(7, 6).to(DEVICE)
    channels = gaussian(16, 4, 2, seed=0).bfloat16().requires_grad_()
    decoder, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in (layer.decoder, layer.bias))
    residual = gaussian(2, 6, 5, seed=1).float().mT.requires_grad_()
    torch.library.opcheck(torch.ops.stl.decode, (channels, decoder, bias, residual, 2, 5, 6, False))


def test_the_residual_is_no_product_and_nothing_of_it_is_kept():
    layer = STLLinear(7, 6).to(DEVICE)
    layer.backend = "triton"
    x, residual = gaussian(2, 5, 7, seed=0).float(), gaussian(2, 5, 6, seed=1).float().requires_grad_()
    flops, kept = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        for added in (None, residual):
            with FlopCounterMode(display=False) as counter:
                layer(x, added).sum().backward()
            flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    assert residual.data_ptr() not in kept


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("residual", [torch.zeros(6), torch.zeros(2, 5, 7), torch.zeros(2, 5, 6).long()])
def test_another_residual_gets_one_line(residual, backend):
    x, residual = gaussian(2, 5, 7, seed=0).float(), residual.to(DEVICE)
    for layer in (STLLinear(7, 6).to(DEVICE), mlp(7, 6).to(DEVICE)):
        layer.backend = backend
        with pytest.raises(SettingError, match=r"residual must be floating-point \(2, 5, 6\) on .*; got \("):
            layer(x, residual)
    layer = STLLinear(7, 6).to(DEVICE)
    with pytest.raises(SettingError, match="residual must be"):
        stl_linear(x, *layer.tensors(), residual=residual, backend=backend)
