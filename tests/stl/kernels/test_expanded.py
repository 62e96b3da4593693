"""Narrow layers, which kernels compute as one product, against the reference in float64."""

from typing import Any

import pytest
import torch
from agreement import DEVICE, assert_agree, assert_operator_agrees, assert_the_last_are_as_alone, gaussian, operands
from benchmarking import set_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stl import STLMLP, Norm, SettingError, STLLinear, STLNormLinear, fuse_blocks, stl_linear
from stl.kernels.expanded import expand, expanded_linear, is_expanded

BASES = [("hadamard", 4, 16), ("frame", 4, 24), ("strassen", 4, 49), ("strassen", 2, 7), ("random", 8, 16)]
ROWS = 200704


@pytest.fixture
def no_kernels(monkeypatch):
    """Those that encode, decode and stand between layers would fail; in any precision, few rows are enough."""
    for name in ("encode._launch", "decode._launch", "mlp.hidden", "norm._norm_encode"):
        monkeypatch.setattr(f"stl.kernels.{name}", None)
    monkeypatch.setattr("stl.kernels.expanded.DTYPES", (torch.float32, torch.bfloat16, torch.float16))
    monkeypatch.setattr("stl.kernels.expanded.BUILDING", 0)


@pytest.mark.parametrize("basis", BASES)
def test_the_matrix_is_the_layer_on_whole_rows_of_tiles(basis):
    _, tile, _ = basis
    x, weight, encoder, decoder, _ = (tensor.detach() for tensor in operands((3 * tile, 11), 6, *basis))
    matrix = expand(weight, encoder, decoder, 11, 6)
    got = (x.view(3, tile * 11) @ matrix.T).view(3 * tile, 6)
    torch.testing.assert_close(got, stl_linear(x, weight, encoder, decoder, out_features=6))


@given(
    lead=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    rows=st.integers(0, 5),
    k=st.integers(1, 40),
    m=st.integers(1, 40),
    basis=st.sampled_from(BASES),
    bias=st.booleans(),
    features_apart=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_output_and_all_gradients_of_any_size(lead, rows, k, m, basis, bias, features_apart):
    x, *layer = operands((*lead, rows * basis[1], k), m, *basis, bias)
    arguments = [tensor.requires_grad_() for tensor in (x.mT.contiguous().mT if features_apart else x, *layer)]
    x, weight, encoder, decoder, *more = arguments
    got = expanded_linear(x, weight, encoder, decoder, more[0] if more else None, m, None)
    wanted = stl_linear(*arguments, out_features=m)
    torch.testing.assert_close(got, wanted)
    gradient = gaussian(*got.shape, seed=3)
    torch.testing.assert_close(*(torch.autograd.grad(y, arguments, gradient) for y in (got, wanted)))


@pytest.mark.parametrize("basis", BASES)
def test_a_layer_by_kernels(basis, no_kernels):
    assert_operator_agrees(operands((2, 16, 7), 10, *basis), torch.float32, 2e-6)


@pytest.mark.parametrize("m", [8, 9])  # in 16 bits zeros fill the rows of the second
def test_what_comes_out_is_contiguous(m, no_kernels):
    arguments = [tensor.bfloat16() for tensor in operands((2, 8, 11), m, "hadamard", 4, 16)]
    y = stl_linear(*arguments, out_features=m, backend="triton")
    assert y.shape == (2, 8, m)
    assert y.is_contiguous()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32, torch.float64])
def test_a_residual_of_any_precision(precision, no_kernels):
    arguments = [tensor.detach().bfloat16() for tensor in operands((3, 8, 11), 9, "hadamard", 4, 16)]
    residual = gaussian(3, 8, 9, seed=5).to(precision).requires_grad_()
    y = stl_linear(*arguments, residual=residual, backend="triton")
    exact = stl_linear(*(tensor.double() for tensor in arguments)) + residual.double()
    assert y.dtype == torch.promote_types(torch.bfloat16, precision)
    assert (y.double() - exact).norm() <= 0.01 * exact.norm()
    (gradient,) = torch.autograd.grad(y.sum(), residual)
    assert torch.equal(gradient, torch.ones_like(residual))


def test_under_autocast_the_matrix_is_rounded_once(no_kernels):
    arguments = [tensor.detach().float().requires_grad_() for tensor in operands((2, 8, 12), 8, "frame", 4, 24)]
    x, weight, encoder, decoder, bias = arguments
    with torch.autocast(DEVICE, torch.bfloat16):
        y = stl_linear(*arguments, backend="triton")
    matrix = expand(weight, encoder, decoder, 12, 8).bfloat16()
    wanted = (x.bfloat16().double().view(-1, 48) @ matrix.double().T).view(2, 8, 8) + bias.bfloat16().double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-3)
    exact = torch.autograd.grad(stl_linear(*arguments).square().sum(), arguments)
    for got, gradient in zip(torch.autograd.grad(y.float().square().sum(), arguments), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - gradient).norm() <= 0.02 * gradient.norm()


def test_an_exported_program_runs_under_autocast(no_kernels):
    """What it is then given is of autocast's dtype, and its parameters are of another."""
    model = nn.Sequential(nn.Linear(9, 11), STLLinear(11, 9, basis="frame", rank=24)).to(DEVICE, torch.bfloat16)
    nn.init.normal_(model[1].bias)
    model[1].backend = "triton"
    x = gaussian(2, 8, 9, seed=0).bfloat16()
    exported = torch.export.export(model, (x,)).module()
    with torch.autocast(DEVICE, torch.float16):
        y = exported(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, exported(x).half(), rtol=0.05, atol=0.05)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 20 GB of memory")
def test_more_than_two_to_the_31_elements(no_kernels):
    assert_the_last_are_as_alone(STLLinear(64, 64).to(DEVICE), 8, 64)


class Parts(nn.Module):
    """An MLP behind a norm, as blocks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = STLNormLinear(nn.LayerNorm(12), STLLinear(12, 8, rank=49, basis="strassen"))
        self.mlp = STLMLP(STLLinear(8, 20, rank=24, basis="frame"), "gelu", STLLinear(20, 6, rank=24, basis="frame"))
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        set_backend(self.norm, self.backend)
        set_backend(self.mlp, self.backend)
        return self.mlp(self.norm(x))


@pytest.fixture
def parts(no_kernels):
    torch.manual_seed(0)
    return Parts().to(DEVICE).eval()


def test_norms_and_mlps_leave_narrow_layers_to_themselves(parts):
    assert_agree(parts, gaussian(2, 8, 12, seed=0), torch.float32, 5e-6)


def test_it_compiles_without_graph_breaks(parts):
    parts.backend, x = "triton", gaussian(2, 8, 12, seed=0).float()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(parts, fullgraph=True, backend="aot_eager")(x), parts(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_it_exports_with_any_batch_and_any_number_of_rows(strict, axis, parts, monkeypatch):
    """Narrow only where the rows are whole tiles whatever the size."""
    monkeypatch.undo()
    monkeypatch.setattr("stl.kernels.expanded.DTYPES", (torch.float32,))
    parts.backend = "triton"
    dynamic = {"x": {axis: torch.export.Dim("size")}}
    exported = torch.export.export(parts, (gaussian(2, 8, 12, seed=0).float(),), dynamic_shapes=dynamic, strict=strict)
    assert ("stl." in str(exported.graph)) == (axis == 1)
    x = gaussian(*((5, 8, 12), (2, 11, 12))[axis], seed=1).float()
    torch.testing.assert_close(exported.module()(x), parts(x))


def test_compiled_for_any_size_it_is_compiled_once(monkeypatch):
    monkeypatch.setattr("stl.kernels.expanded.DTYPES", (torch.float32,))
    layer, graphs = STLLinear(12, 8).to(DEVICE), []
    layer.backend = "triton"

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, dynamic=True, backend=count)
    for rows in (8, 9, 16):
        compiled(gaussian(2, rows, 12, seed=0).float())
    assert len(graphs) == 1


def narrow(k: int, m: int, rank: int = 16, rows: int = ROWS, row_axis: str = "tokens", **changed: Any) -> bool:
    x = torch.empty((), dtype=changed.get("dtype", torch.bfloat16)).expand(rows // 8, 8, k)
    return is_expanded(x, 4, rank, [(k, m)], row_axis, changed.get("beside", 0))


def test_what_is_narrow():
    assert narrow(64, 64)
    assert narrow(192, 192)
    assert not narrow(576, 192)  # too much arithmetic
    assert narrow(576, 192, rank=24)  # of which encoded tiles are more to move
    assert not narrow(64, 64, rows=25088)  # the matrix would take longer
    assert not narrow(64, 64, beside=128)  # kernels would take what stands beside the layer
    assert not narrow(64, 64, dtype=torch.float32)
    assert not narrow(64, 64, row_axis="batch")
    x = torch.empty((), dtype=torch.bfloat16).expand(ROWS, 7, 64)
    assert not is_expanded(x, 4, 16, [(64, 64)], "tokens")  # no whole tiles
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow(64, 64, dtype=torch.float32)
    rows = 190_000  # enough for one matrix
    assert narrow(64, 64, rows=rows)
    x = torch.empty((), dtype=torch.bfloat16).expand(rows // 8, 8, 64)
    assert not is_expanded(x, 4, 16, [(64, 64), (1, 1)], "tokens")  # but not for two


def test_zeros_beside_odd_features_cost_a_copy_but_in_compiled_code(monkeypatch):
    assert not narrow(147, 192, rows=802816)
    assert narrow(148, 192, rows=802816)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert narrow(147, 192, rows=802816)


def mlp(*ranks: int) -> STLMLP:
    layers = [
        STLLinear(k, m, rank=r, basis="random") for (k, m), r in zip(((128, 256), (256, 128)), ranks, strict=True)
    ]
    return STLMLP(layers[0], "gelu", layers[1])


def test_an_mlp_is_narrow_where_that_saves_more_than_hidden_features_in_memory():
    x = torch.empty((), dtype=torch.bfloat16).expand(1024, 196, 128)
    ranks = [(16, 16), (32, 32), (16, 32), (32, 16)]
    assert [mlp(*each).is_narrow(x) for each in ranks] == [False, True, False, False]


def test_rows_that_are_samples_are_never_narrow():
    x = torch.empty((), dtype=torch.bfloat16).expand(4 * ROWS, 64)
    layers = STLLinear(64, 64), STLLinear(64, 64)
    module = STLMLP(layers[0], "gelu", layers[1])
    assert not module.is_narrow(x)
    assert module.is_narrow(x.view(4096, 196, 64))


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3)])
def test_what_has_no_rows_is_refused_in_the_words_of_the_reference(x):
    module = mlp(16, 16).bfloat16()
    with pytest.raises(SettingError, match=r"x has shape .*; in_features=128 must be its last size"):
        module(x.bfloat16())


@pytest.mark.parametrize(("module", "k"), [(mlp(16, 16), 128), (STLLinear(192, 256), 192)], ids=["mlp", "layer"])
def test_a_norm_stays_with_what_is_narrow_without_it(module, k, no_kernels):
    """Of the MLP the first layer alone is."""
    x = torch.empty(2, 8, k, device=DEVICE)
    set_backend(module, "triton")
    assert is_expanded(x, 4, 16, [(k, 256)], "tokens")
    assert module.normalises(Norm(torch.ones(k, device=DEVICE), None, 1e-5, True), x)


def test_blocks_compute_norms_with_an_mlp_of_which_the_first_layer_alone_is_narrow(no_kernels):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(128), mlp(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    block = Block().to(DEVICE)
    fuse_blocks(block)
    set_backend(block, "triton")
    x = torch.empty(2, 8, 128, device=DEVICE)
    assert "norm_encode_gemm" in str(torch.export.export(block, (x,)).graph)
