"""Narrow layers, which are one kernel each way, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    DEVICE,
    assert_agree,
    assert_operator_agrees,
    assert_the_last_are_as_alone,
    gaussian,
    operands,
    operator_flops,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, STLLinear, stl_linear
from stl.kernels import narrow
from stl.kernels.narrow import is_narrow
from stl.mlp import ACTIVATIONS

ROW_AXES = ["tokens", "batch"]
CPU = DEVICE == "cpu"
DTYPE, TOLERANCE = (torch.float32, 2e-6) if CPU else (torch.bfloat16, 0.05)  # in the interpreter any, on a GPU 16 bits


@pytest.fixture(autouse=True)
def all_are_narrow(monkeypatch):
    """Also those that the kernels of wide ones, which would fail, compute faster."""
    for module in ("encode", "decode"):
        monkeypatch.setattr(f"stl.kernels.{module}._launch", None)
    for module in ("linear", "mlp"):
        monkeypatch.setattr(f"stl.kernels.{module}.is_narrow", lambda *_: True)


@pytest.mark.parametrize("row_axis", ROW_AXES)
@pytest.mark.parametrize("basis", [("hadamard", 4, 16), ("frame", 4, 24), ("frame", 4, 32), ("random", 4, 7)])
def test_output_and_all_gradients(basis, row_axis):
    assert_operator_agrees(operands((3, 7, 13), 10, *basis), DTYPE, TOLERANCE, row_axis=row_axis)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    n=st.integers(1, 70),
    k=st.integers(1, 64),
    m=st.integers(1, 64),
    rank=st.integers(7, 32),
    bias=st.booleans(),
    row_axis=st.sampled_from(ROW_AXES),
)
@settings(deadline=None, derandomize=True, max_examples=10)
def test_any_size_and_rank(lead, n, k, m, rank, bias, row_axis):
    arguments = operands((*lead, n, k), m, "random", 4, rank, bias)
    assert_operator_agrees(arguments, DTYPE, TOLERANCE, row_axis=row_axis, out_features=m)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (64, 64, 64), (147, 12, 3), (197, 36, 8), (1000, 63, 62)])
def test_odd_sizes(sizes):
    n, k, m = sizes
    assert_operator_agrees(operands((n, k), m, "hadamard", 4, 16), DTYPE, TOLERANCE)


@pytest.mark.parametrize(("samples", "n", "k"), [(5, 61, 62), (3, 64, 64)])  # the last program has not all of its rows
def test_sums_over_many_rows_of_tiles(samples, n, k, monkeypatch):
    monkeypatch.setattr("stl.kernels.narrow.PROGRAMS", 1)
    assert_operator_agrees(operands((samples, n, k), 64, "hadamard", 4, 16), DTYPE, TOLERANCE)


def test_nothing_is_read_behind_rows_that_end_with_a_tile():
    arguments = [tensor.to(DTYPE) for tensor in operands((2, 8, 60), 20, "hadamard", 4, 16)]
    arguments[0] = F.pad(arguments[0], (0, 8), value=float("nan"))[..., :60]
    assert_operator_agrees(arguments, DTYPE, TOLERANCE)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("row_axis", ROW_AXES)
def test_a_residual_of_any_precision(precision, row_axis):
    arguments = [tensor.to(DTYPE).requires_grad_() for tensor in operands((3, 6, 11), 9, "hadamard", 4, 16)]
    residual = gaussian(3, 6, 9, seed=5).to(precision).requires_grad_()
    y = stl_linear(*arguments, row_axis=row_axis, residual=residual, backend="triton")
    inputs = [tensor.detach().double().requires_grad_() for tensor in arguments]
    exact = stl_linear(*inputs, row_axis=row_axis) + residual.detach().double()
    assert y.dtype == torch.promote_types(DTYPE, precision)
    assert (y.double() - exact).norm() <= TOLERANCE * exact.norm()
    *gradients, added = torch.autograd.grad(y.sum(), [*arguments, residual])
    assert torch.equal(added, torch.ones_like(residual))
    for got, wanted in zip(gradients, torch.autograd.grad(exact.sum(), inputs), strict=True):
        assert got.dtype == DTYPE
        assert (got.double() - wanted).norm() <= TOLERANCE * wanted.norm()


def mlp(activation: str = "gelu", bias: bool = True, hidden: int = 38) -> STLMLP:
    torch.manual_seed(0)
    layers = [STLLinear(k, m, bias, basis="frame", rank=24) for k, m in ((23, hidden), (hidden, 17))]
    module = STLMLP(layers[0], activation, layers[1]).to(DEVICE)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_mlp_and_all_its_gradients(activation, bias):
    # In 16 bits a rounding may take a sum of 1600 across relu's kink, and its gradient with it: 1/√800 of all.
    tolerance = 3 * TOLERANCE if activation == "relu" else max(TOLERANCE, 5e-6)
    assert_agree(mlp(activation, bias), gaussian(2, 21, 23, seed=0), DTYPE, tolerance)


def test_an_activation_is_computed_before_the_addition():
    x, *layer = (tensor.to(DTYPE) for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16))
    residual = gaussian(2, 5, 6, seed=1).to(DTYPE)
    y = torch.ops.stl.narrow_linear(x, *layer, residual, 6, "relu", False)
    exact = stl_linear(*(tensor.double() for tensor in (x, *layer))).relu() + residual.double()
    assert (y.double() - exact).norm() <= TOLERANCE * exact.norm()


@pytest.mark.parametrize("frozen", [(), (2, 3), (0,), (1, 2, 3), (4,), (0, 1, 2, 3)])
def test_gradients_where_others_are_frozen(frozen):
    arguments = [tensor.to(DTYPE) for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16)]
    trained = [tensor.requires_grad_() for index, tensor in enumerate(arguments) if index not in frozen]
    gradients = torch.autograd.grad(stl_linear(*arguments, backend="triton").sum(), trained)  # one that is expanded
    exact = torch.autograd.grad(stl_linear(*(tensor.double() for tensor in arguments)).sum(), trained)
    for got, wanted in zip(gradients, exact, strict=True):
        assert (got.double() - wanted.double()).norm() <= TOLERANCE * wanted.double().norm()


def test_nothing_is_computed_for_a_residual_alone():
    arguments = [tensor.to(DTYPE) for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16)]
    residual = gaussian(2, 5, 6, seed=1).to(DTYPE).requires_grad_()
    y = stl_linear(*arguments, residual=residual, backend="triton")
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    arguments = [tensor.float().requires_grad_() for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16)]
    with torch.autocast(DEVICE, dtype):
        y = stl_linear(*arguments, backend="triton")
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y.float().square().sum(), arguments)
    exact = torch.autograd.grad(stl_linear(*arguments).square().sum(), arguments)
    for got, wanted in zip(gradients, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() <= 0.05 * wanted.norm()


def test_the_operators_keep_the_rules_of_pytorch():
    for bias in (True, False):
        x, *layer = (t.to(DTYPE).requires_grad_() for t in operands((2, 5, 7), 6, "hadamard", 4, 16, bias))
        if not bias:
            layer.append(None)
        for activation, residual in (("relu", None), ("", gaussian(2, 5, 6, seed=1).float().requires_grad_())):
            torch.library.opcheck(torch.ops.stl.narrow_linear, (x, *layer, residual, 6, activation, False))


def test_compiles_without_graph_breaks_and_exports():
    module = mlp().to(DTYPE)
    module.backend, x = "triton", gaussian(2, 5, 23, seed=0).to(DTYPE)
    torch.compiler.reset()
    wanted = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), wanted)
    exported = torch.export.export(module, (x,))
    assert str(exported.graph).count("stl.narrow_linear") == 2
    assert torch.equal(exported.module()(x), wanted)


def test_an_exported_program_runs_under_autocast():
    """What it is then given is of autocast's dtype, and its parameters are of another."""
    layer = STLLinear(8, 8, basis="frame", rank=24).to(DEVICE)
    layer.bias.data += 1
    layer.backend = "triton"
    model, x = nn.Sequential(nn.Linear(8, 8).to(DEVICE), layer).to(DTYPE), gaussian(2, 5, 8, seed=0).to(DTYPE)
    exported = torch.export.export(model, (x,)).module()
    with torch.autocast(DEVICE, torch.float16):
        y = exported(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, exported(x).half(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("row_axis", ROW_AXES)
def test_the_counted_flops_are_those_of_the_reference_and_of_computing_again(row_axis):
    arguments = [tensor.to(DTYPE).requires_grad_() for tensor in operands((3, 6, 7), 10, "hadamard", 4, 16)]

    (forward, backward), (wanted, wanted_backward) = (
        operator_flops(arguments, row_axis=row_axis, backend=backend) for backend in ("triton", "torch")
    )
    rows = 3 * 2 if row_axis == "tokens" else 6
    assert forward == wanted
    assert backward == wanted_backward + 2 * rows * (2 * 16 * 16 + 2 * 3 * 16)  # of 2 tiles, with 3 behind them


def test_an_activation_is_computed_again_as_well():
    x, *layer = (tensor.to(DTYPE).requires_grad_() for tensor in operands((3, 6, 7), 10, "hadamard", 4, 16))
    counts = []
    for activation in ("", "relu"):
        y = torch.ops.stl.narrow_linear(x, *layer, None, 10, activation, False)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 3 * 2 * 3 * 16 * 16


def test_the_backward_pass_keeps_what_was_given():
    arguments = [tensor.to(DTYPE).requires_grad_() for tensor in operands((2, 8, 16), 8, "hadamard", 4, 16)]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        stl_linear(*arguments, backend="triton")
    assert sum(kept.values()) == sum(tensor.numel() for tensor in arguments)


def test_inputs_of_any_strides():
    arguments = [tensor.to(DTYPE) for tensor in operands((3, 5, 7), 6, "hadamard", 4, 16)]
    strided = [torch.stack([a, a * float("nan")], -1)[..., 0] for a in arguments]
    expanded = [arguments[0][:1].expand(3, 5, 7), *arguments[1:]]
    for changed in (strided, expanded):
        assert not all(tensor.is_contiguous() for tensor in changed)
        assert_operator_agrees(changed, DTYPE, TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6)])
def test_empty_inputs(shape):
    x, *others = (t.to(DTYPE).requires_grad_() for t in operands(shape, 7, "hadamard", 4, 16))
    y = stl_linear(x, *others, backend="triton")
    assert y.shape == (*shape[:-1], 7)
    gradients: tuple[Tensor, ...] = torch.autograd.grad(y.sum(), [x, *others])
    assert all((gradient == 0).all() for gradient in gradients)


def test_what_is_narrow(monkeypatch):
    monkeypatch.setattr(narrow, "INTERPRETED", False)
    assert is_narrow(torch.bfloat16, 4, (16, 16, 16))
    assert is_narrow(torch.float16, 4, (32, 16, 16))
    assert not is_narrow(torch.float32, 4, (16, 16, 16))
    assert not is_narrow(torch.bfloat16, 8, (16, 16, 16))
    assert not is_narrow(torch.bfloat16, 4, (33, 16, 16))
    assert not is_narrow(torch.bfloat16, 4, (16, 15, 16))
    assert not is_narrow(torch.bfloat16, 4, (16, 16, 17))


@pytest.mark.parametrize(("k", "m", "narrow"), [(64, 61, True), (60, 64, False), (64, 68, False)])
def test_what_is_narrow_takes_its_operator(k, m, narrow, monkeypatch):
    for module in ("linear", "mlp"):
        monkeypatch.setattr(f"stl.kernels.{module}.is_narrow", is_narrow)
    layers = [STLLinear(*sizes, rank=16, basis="frame").to(DEVICE, DTYPE) for sizes in ((k, m), (m, k))]
    for module, count in ((layers[0], 1), (STLMLP(layers[0], "gelu", layers[1]), 2)):
        module.backend = "triton"
        graph = torch.export.export(module, (gaussian(2, 5, k, seed=0).to(DTYPE),)).graph  # computes nothing
        assert str(graph).count("stl.narrow_linear") == (count if narrow else 0)


@pytest.mark.skipif(CPU, reason="needs a GPU with 40 GB of memory")
def test_more_than_two_to_the_31_elements():
    assert_the_last_are_as_alone(STLLinear(64, 64).to(DEVICE), 8, 64)
