"""`STLMLP` by kernels against its layers in float64, one after the other: on the GPU where there is one, else in
Triton's interpreter."""

import pytest
import torch
from agreement import DEVICE, assert_agree, assert_the_last_are_as_alone, gaussian, with_strides
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, SettingError, STLLinear
from stl.mlp import ACTIVATIONS

PAIRS = [((4, 16, "hadamard"), (4, 24, "frame")), ((2, 7, "strassen"), (2, 4, "hadamard"))]
PAIRS += [((4, 49, "strassen"), (4, 16, "hadamard")), ((8, 64, "hadamard"), (8, 64, "hadamard"))]
# of Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def mlp(
    sizes: tuple[int, int, int],
    pair: tuple = PAIRS[0],
    activation: str = "gelu",
    bias: bool = True,
    row_axis: str = "tokens",
    dropout: float = 0.0,
    up: tuple | None = None,
    halves: bool = False,
) -> STLMLP:
    """In float64, with numbers that are nothing special; gated with `up`, the basis of the third layer, or by
    `halves` of the first."""
    torch.manual_seed(0)

    def layer(k: int, m: int, tile: int, rank: int, basis: str) -> STLLinear:
        return STLLinear(k, m, bias, tile=tile, rank=rank, basis=basis, row_axis=row_axis)

    first, second = layer(sizes[0], (1 + halves) * sizes[1], *pair[0]), layer(*sizes[1:], *pair[1])
    gate = layer(*sizes[:2], *up) if up else None
    module = STLMLP(first, activation, second, dropout=dropout, up=gate, halves=halves).double().to(DEVICE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("pair", PAIRS)
def test_output_and_all_gradients(pair, row_axis):
    assert_agree(mlp((9, 13, 10), pair, row_axis=row_axis), gaussian(3, 7, 9, seed=0))


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("pair", PAIRS)
def test_output_and_all_gradients_of_a_gated_mlp(pair, row_axis):
    module = mlp((9, 13, 10), pair, "silu", bias=row_axis == "batch", row_axis=row_axis, up=pair[1])
    assert_agree(module, gaussian(3, 7, 9, seed=0))


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("pair", PAIRS)
def test_output_and_all_gradients_of_one_gated_by_halves(pair, row_axis):
    module = mlp((9, 40, 10), pair, "silu", bias=row_axis == "batch", row_axis=row_axis, halves=True)
    assert_agree(module, gaussian(3, 7, 9, seed=0))


@pytest.mark.parametrize("samples", [3, 4])
def test_where_copies_fill_tiles_its_layers_do_so_each_by_itself(samples):
    module = mlp((9, 13, 10), row_axis="batch")
    module.fill = "copies"
    assert {layer.fill for layer in module.layers} == {"copies"}
    assert_agree(module, gaussian(samples, 3, 9, seed=0))
    module.backend = "triton"
    assert module.uses_kernels(torch.empty(samples, 3, 9, device=DEVICE)) == (samples == 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, bias):
    assert_agree(mlp((9, 13, 10), activation=activation, bias=bias), gaussian(2, 5, 9, seed=0))


@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 1), (2, 1, 3, 6), (1, 147, 3), (2, 0, 5), (0, 5, 5)])
def test_odd_shapes(shape):
    assert_agree(mlp((shape[-1], 7, 3)), gaussian(*shape, seed=0))


def test_sums_over_many_rows_of_tiles(monkeypatch):
    for programs in ("tiles.PROGRAMS", "hidden.MANY_PROGRAMS"):
        monkeypatch.setattr(f"stl.kernels.{programs}", 3)
    assert_agree(mlp((5, 70, 9), up=(4, 16, "hadamard")), gaussian(5, 13, 5, seed=0))
    assert_agree(mlp((5, 76, 9), halves=True), gaussian(5, 13, 5, seed=0))
    assert_agree(mlp((5, 138, 9), PAIRS[1], halves=True), gaussian(5, 13, 5, seed=0))


@pytest.mark.parametrize("more", [{}, {"up": (4, 16, "hadamard")}, {"halves": True}], ids=["plain", "gated", "halves"])
@pytest.mark.parametrize(("shape", "hidden"), [((4, 128, 24), 40), ((48, 6, 96), 160)])
def test_rows_of_tiles_side_by_side_fill_blocks(shape, hidden, more, together, monkeypatch):
    for programs in ("PROGRAMS", "MANY_PROGRAMS"):
        monkeypatch.setattr(f"stl.kernels.hidden.{programs}", 4)  # each takes several rows, the last fewer
    assert_agree(
        mlp((shape[2], 2 * hidden if "halves" in more else hidden, shape[2]), **more), gaussian(*shape, seed=0)
    )
    assert together
    assert all(rows > 1 for rows in together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    assert_agree(mlp((32, 48, 32)), gaussian(2, 8, 32, seed=0), dtype, 0.05)


def test_large_and_small_arguments_of_every_activation():
    for activation, function in ACTIVATIONS.items():
        module = mlp((4, 4, 4), ((4, 49, "strassen"),) * 2, activation).float()
        for layer in module.layers:  # both multiply with one
            layer.load_dense(torch.eye(4, device=DEVICE), torch.zeros(4, device=DEVICE))
        module.backend = "triton"
        x = torch.linspace(-30, 30, 64, device=DEVICE).view(4, 4, 4)
        torch.testing.assert_close(module(x), function(x), atol=1e-4, rtol=1e-5)


def test_the_operator_keeps_the_rules_of_pytorch():
    module = mlp((9, 13, 10)).float()
    first, second = module.layers
    channels = gaussian(16, 4, 4, seed=1).float().requires_grad_()
    gated = (channels.detach() + 1, first.decoder.detach() + 1, None)
    for bias, up in ((first.bias, (None, None, None)), (None, gated)):
        arguments = (channels, first.decoder, bias, *up, second.encoder, second.weight, "gelu", 2, 7, 13)
        torch.library.opcheck(torch.ops.stl.hidden_gemm, arguments)
    bias, last = gaussian(16, seed=2).float(), (second.encoder, second.weight[:, :2])
    both = (channels, first.decoder, bias, None, None, None, *last, "gelu", 2, 7, 8)
    torch.library.opcheck(torch.ops.stl.hidden_gemm, both)


GATES = [{}, {"up": (4, 16, "hadamard")}, {"halves": True}]


@pytest.mark.parametrize("gate", GATES)
def test_biases_of_any_stride(gate):
    module, x = with_strides(mlp((9, 16, 10), **gate).float()), gaussian(2, 5, 9, seed=0).float()
    wanted = module(x)
    module.backend = "triton"
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_compiles_without_graph_breaks(gate):
    module, x = mlp((9, 16, 10), **gate).float(), gaussian(2, 5, 9, seed=0).float()
    module.backend = "triton"
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_autocast_and_dropout():
    module, x = mlp((9, 13, 10), dropout=0.5).float(), gaussian(2, 5, 9, seed=0).float()
    module.backend = "triton"
    with torch.autocast(DEVICE, torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert 0.2 < (y == 0).float().mean() < 0.8
    assert (module.eval()(x) != 0).all()


@pytest.mark.parametrize("gate", GATES)
def test_the_counted_flops_are_those_of_the_layers_and_of_computing_again(gate):
    module, x = mlp((9, 16, 10), **gate).float(), gaussian(2, 5, 9, seed=0).float().requires_grad_()

    def flops(backend: str) -> tuple[int, int]:
        module.backend = backend
        with FlopCounterMode(display=False) as counter:
            y = module(x)
            forward = counter.get_total_flops()
            y.sum().backward()
        return forward, counter.get_total_flops() - forward

    (forward, backward), (wanted, wanted_backward) = flops("triton"), flops("torch")
    tiles = 2 * 2  # rows of tiles
    # encode of x; decode and encode between the layers
    again = (2 if "up" in gate else 1) * tiles * 3 * 16 * 16 + tiles * 4 * 16 * ((2 if gate else 1) * 16 + 24)
    assert forward == wanted
    assert backward == wanted_backward + 2 * again


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, lambda layer: layer.to("meta"), "bias"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_last_layer_that_does_not_fit_gets_the_line_of_the_reference(change, backend):
    module, x = mlp((9, 13, 10)).float(), gaussian(2, 5, 9, seed=0).float()
    module.backend = backend
    if change == "bias":
        module.fc2.bias = nn.Parameter(torch.zeros(7, device=DEVICE))
    else:
        change(module.fc2)
    with pytest.raises(SettingError, match=r"out_features=10 with bias|one dtype|one device"):
        module(x)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 80 GB of memory")
def test_more_than_two_to_the_31_elements():
    assert_the_last_are_as_alone(mlp((512, 512, 512)), 8, 512)


def test_the_hidden_activations_are_not_kept():
    module, x = mlp((8, 64, 8), (PAIRS[0][0], (4, 16, "hadamard"))).float(), gaussian(2, 8, 8, seed=0).float()
    module.backend = "triton"
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        module(x)
    parameters = {tensor.data_ptr() for tensor in module.parameters()}
    activations = sum(size for place, size in kept.items() if place not in parameters)
    assert activations == 2 * 8 * (8 + 64 + 8)  # x, and the channels of either layer


@pytest.mark.parametrize("x", [torch.zeros(2, 5, 8), torch.zeros(2, 5, 9).long(), torch.zeros(2, 5, 9).half()])
def test_bad_input_gets_the_errors_of_the_layer(x):
    module, messages = mlp((9, 13, 10)).float(), []
    for backend in ("torch", "triton"):
        module.backend = backend
        with pytest.raises(SettingError) as caught:
            module(x.to(DEVICE))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[1]
