"""`STLNormLinear` by kernels against its two modules in float64, one after the other: on the GPU where there is one,
else in Triton's interpreter."""

from itertools import cycle, product

import pytest
import torch
import triton
from agreement import DEVICE, assert_agree, assert_the_last_are_as_alone, gaussian, with_strides
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stl import Norm, SettingError, STLLinear, STLNormLinear, count_flops
from stl.kernels import norm
from stl.kernels.tiles import Tiling

BASES = [("strassen", 2, 7), ("hadamard", 4, 16), ("frame", 4, 24), ("hadamard", 8, 64)]
NORMS = {"layer": nn.LayerNorm, "layer, no bias": lambda k: nn.LayerNorm(k, bias=False), "rms": nn.RMSNorm}

# every pair of a basis and a norm, of a basis and an axis, and of a norm and an axis
CASES = [(*pair, axis) for pair, axis in zip(product(BASES, NORMS), cycle(["tokens", "batch"]), strict=False)]


def module(
    k: int, m: int, basis: tuple[str, int, int] = BASES[1], norm: str = "layer", row_axis: str = "tokens"
) -> STLNormLinear:
    """In float64, with numbers that are nothing special."""
    torch.manual_seed(0)
    name, tile, rank = basis
    made = STLNormLinear(NORMS[norm](k), STLLinear(k, m, tile=tile, rank=rank, basis=name, row_axis=row_axis))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made.double().to(DEVICE)


@pytest.mark.parametrize(("basis", "norm", "row_axis"), CASES)
def test_output_and_all_gradients(basis, norm, row_axis):
    assert_agree(module(13, 10, basis, norm, row_axis), 2 * gaussian(3, 7, 13, seed=0) + 1)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 1, 3, 6), (1, 147, 3), (1, 3, 1000), (2, 0, 5), (0, 5, 5)])
def test_odd_shapes(shape):
    assert_agree(module(shape[-1], 6), gaussian(*shape, seed=0) + 1)


@pytest.mark.parametrize("norm", NORMS)
def test_without_any_eps_rows_that_do_not_exist_are_still_zeros(norm):
    layer, x = module(16, 6, norm=norm), gaussian(2, 7, 16, seed=0)
    layer.norm.eps = 0.0
    assert_agree(layer, x)


def test_gains_and_shifts_of_any_stride():
    made, x = with_strides(module(13, 10).float()), gaussian(2, 5, 13, seed=0).float()
    wanted = made(x)
    made.backend = "triton"
    torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [nn.Module.double, lambda norm: norm.to("meta")])
def test_a_norm_that_does_not_go_with_x_is_refused_as_by_pytorch(change):
    made, x = module(13, 10).float(), gaussian(2, 5, 13, seed=0).float()
    made.backend = "triton"
    change(made.norm)
    with pytest.raises(RuntimeError):
        made(x)


def test_sums_over_many_rows_of_tiles(monkeypatch):
    monkeypatch.setattr("stl.kernels.norm.PROGRAMS", 3)  # each takes several, the last fewer
    for n in (13, 12):
        assert_agree(module(70, 9), gaussian(5, n, 70, seed=0))
    assert_agree(module(142, 9, BASES[0]), gaussian(5, 13, 142, seed=0))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 60 GB of memory")
def test_more_than_two_to_the_31_elements():
    assert_the_last_are_as_alone(module(512, 512), 8, 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    assert_agree(module(32, 24), gaussian(2, 8, 32, seed=0), dtype, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_an_eps_it_is_that_of_pytorch(dtype):
    made = module(32, 24, norm="rms").to(dtype)
    x = (gaussian(2, 8, 32, seed=0) / 3000).to(dtype)  # whose squares are about as large
    assert made.norm.eps is None
    wanted = made(x)
    made.backend = "triton"
    assert (made(x) - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_operator_keeps_the_rules_of_pytorch(norm):
    made = module(13, 10, norm=norm).float()
    x, linear = gaussian(2, 5, 13, seed=0).float().requires_grad_(), made.linear
    arguments = (x, made.norm.weight, getattr(made.norm, "bias", None), linear.weight, linear.encoder)
    torch.library.opcheck(torch.ops.stl.norm_encode_gemm, (*arguments, 1e-5, norm == "layer", False))


def test_under_autocast_the_norm_sees_what_it_sees_in_float32():
    made, x = module(13, 10).float(), gaussian(2, 5, 13, seed=0).float().requires_grad_()
    x = x + 300  # what bf16 would lose
    results = {}
    for backend in ("torch", "triton"):
        made.backend = backend
        with torch.autocast(DEVICE, torch.bfloat16):
            results[backend] = made(x)
    assert results["triton"].dtype == torch.bfloat16
    torch.testing.assert_close(results["triton"], results["torch"], atol=0.1, rtol=0.1)
    gradients = torch.autograd.grad(results["triton"].float().square().sum(), list(made.parameters()))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_compiles_without_graph_breaks():
    made, x = module(13, 10).float(), gaussian(2, 5, 13, seed=0).float()
    made.backend = "triton"
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_the_counted_flops_are_those_of_the_layer_and_of_encoding_again():
    made, x = module(13, 10).float(), gaussian(2, 5, 13, seed=0).float().requires_grad_()

    def flops(backend: str) -> tuple[int, int]:
        made.backend = backend
        with FlopCounterMode(display=False) as counter:
            y = made(x)
            forward = counter.get_total_flops()
            y.sum().backward()
        return forward, counter.get_total_flops() - forward

    (forward, backward), (wanted, wanted_backward) = flops("triton"), flops("torch")
    assert forward == wanted
    assert backward == wanted_backward + 2 * (2 * 2) * 4 * 16 * 16
    made.backend = "triton"
    assert 2 * count_flops(made, x.shape).total == forward


def test_what_is_too_wide_for_one_program_is_computed_one_after_the_other(monkeypatch):
    made, x = module(13, 10).float(), gaussian(2, 5, 13, seed=0).float()
    wanted = made(x)
    monkeypatch.setattr("stl.kernels.MOST_NORMALISED_TILES", {4: (3, 3)})
    made.backend = "triton"
    torch.testing.assert_close(made(x), wanted)


@pytest.mark.parametrize(
    ("width", "with_gradients", "without"), [(4, True, True), (12, False, True), (13, False, False)]
)
def test_rows_may_be_wider_without_gradients(width, with_gradients, without, monkeypatch):
    made, x = module(width, 10).float(), gaussian(2, 5, width, seed=0).float()
    monkeypatch.setattr("stl.kernels.MOST_NORMALISED_TILES", {4: (3, 1)})
    made.backend = "triton"
    for gradients, fused in ((True, with_gradients), (False, without)):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            made(x)
        assert ("stl.norm_encode_gemm" in map(str, counter.get_flop_counts()["Global"])) == fused


@pytest.mark.parametrize("features", [4, 16])
def test_a_norm_of_other_features_is_refused_as_by_pytorch(features):
    layer, x = module(13, 10).float().linear, gaussian(2, 5, 13, seed=0).float()
    layer.backend = "triton"
    with pytest.raises(RuntimeError):
        layer(x, None, Norm(torch.ones(features, device=DEVICE), None, 1e-5, False))


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (nn.LayerNorm(8), "must normalise the 13 features"),
        (nn.LayerNorm((2, 13)), "must normalise the 13 features"),
        (nn.LayerNorm(13, elementwise_affine=False), "with weights"),
        (nn.BatchNorm1d(13), "must be a LayerNorm or an RMSNorm"),
    ],
)
def test_another_norm_gets_one_line(norm, said):
    with pytest.raises(SettingError, match=said):
        STLNormLinear(norm, STLLinear(13, 10))


def test_a_dense_layer_gets_one_line():
    with pytest.raises(SettingError, match=r"^Linear is no STLLinear; STLLinear\.from_linear"):
        STLNormLinear(nn.LayerNorm(13), nn.Linear(13, 10))


@pytest.mark.parametrize(
    ("rank", "dtype", "widths_and_warps"),
    [
        (16, torch.bfloat16, {256: (1, 1), 384: (2, 2), 768: (2, 4), 1024: (2, 4), 2048: (4, 8)}),
        (49, torch.bfloat16, {256: (2, 2), 384: (2, 4), 1024: (2, 8)}),
        (16, torch.float32, {256: (4, 4), 384: (8, 8), 1024: (8, 16)}),
    ],
)
def test_a_program_holds_rows_of_tiles_by_as_few_warps_as_have_the_registers(rank, dtype, widths_and_warps):
    encoder = torch.empty(rank, 16, dtype=dtype)
    for width, warps in widths_and_warps.items():
        tiling = Tiling(256, 197, width, 4, width // 4)
        grids = [norm._grid(tiling, encoder, backward) for backward in (False, True)]
        assert [grid.warps for grid in grids] == list(warps)
        assert [grid.rows for grid in grids] == [1, 8]
        assert [grid.programs for grid in grids] == [12800, 1600]
        assert {grid.block for grid in grids} == {triton.next_power_of_2(width // 4)}
