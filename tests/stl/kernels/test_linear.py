"""`stl_linear(backend="triton")` against the reference in float64: on the GPU where there is one, else in Triton's
interpreter."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE, assert_operator_agrees, gaussian, operands, operator_results
from hypothesis import given, settings
from hypothesis import strategies as st
from running import program
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from stl import SettingError, get_basis, kernels, stl_linear
from stl.functional import encode_weight

BASES = [("strassen", 2, 7), ("hadamard", 2, 4), ("hadamard", 4, 16), ("frame", 4, 24), ("frame", 4, 33)]
BASES += [("exact48", 4, 48), ("strassen", 4, 49), ("hadamard", 8, 64)]
ROW_AXES = ["tokens", "batch"]
CPU = DEVICE == "cpu"


@pytest.mark.parametrize("row_axis", ROW_AXES)
@pytest.mark.parametrize("basis", BASES)
def test_output_and_all_gradients(basis, row_axis):
    assert_operator_agrees(operands((3, 7, 13), 10, *basis), torch.float32, 2e-6, row_axis=row_axis)


@given(
    lead=st.lists(st.integers(1, 3), max_size=3).map(tuple),
    n=st.integers(1, 9),
    k=st.integers(1, 20),
    m=st.integers(1, 20),
    rank=st.integers(7, 49),
    bias=st.booleans(),
    row_axis=st.sampled_from(ROW_AXES),
)
@settings(deadline=None, derandomize=True, max_examples=5)
def test_any_size_and_rank(lead, n, k, m, rank, bias, row_axis):
    arguments = operands((*lead, n, k), m, "random", 4, rank, bias)
    assert_operator_agrees(arguments, torch.float32, 2e-6, row_axis=row_axis, out_features=m)


@pytest.mark.parametrize("rank", [*range(7, 50), 64])
def test_every_rank(rank):
    assert_operator_agrees(operands((4, 5), 3, "random", 4, rank), torch.float32, 2e-6)


@pytest.mark.parametrize("basis", [("hadamard", 4, 16), ("strassen", 2, 7)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (147, 12, 3), (197, 36, 8), (8, 1000, 4), (4, 3, 1000)])
def test_odd_sizes(sizes, basis):
    n, k, m = sizes
    assert_operator_agrees(operands((n, k), m, *basis), torch.float32, 2e-6)


@pytest.mark.parametrize("basis", [("hadamard", 4, 16), ("strassen", 2, 7)])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_over_many_rows_of_tiles(rows, basis, monkeypatch):
    monkeypatch.setattr("stl.kernels.tiles.PROGRAMS", 8 // rows)  # each takes several rows, the last fewer
    assert_operator_agrees(operands((5, 13, 142), 150, *basis), torch.float32, 2e-6)


def test_tiles_that_are_all_full_in_rows_of_tiles_that_are_not(monkeypatch):
    for programs in ("tiles.PROGRAMS", "decode.MANY_PROGRAMS"):
        monkeypatch.setattr(f"stl.kernels.{programs}", 4)  # of 15 rows of tiles each takes two
    assert_operator_agrees(operands((5, 12, 20), 20, "hadamard", 4, 16), torch.float32, 2e-6)


@pytest.mark.parametrize(
    ("shape", "m", "basis"),
    [
        ((4, 128, 24), 40, ("hadamard", 4, 16)),
        ((2, 256, 12), 20, ("strassen", 4, 49)),
        ((4, 128, 48), 80, ("strassen", 2, 7)),
        ((4, 128, 48), 80, ("random", 8, 16)),
        ((48, 6, 96), 160, ("hadamard", 4, 16)),
        ((8, 5, 128), 256, ("strassen", 2, 7)),
        ((8, 12, 96), 160, ("random", 8, 16)),
    ],
)
@pytest.mark.parametrize("programs", [4, 1408])
def test_rows_of_tiles_side_by_side_fill_blocks(shape, m, basis, programs, together, monkeypatch):
    for of in ("tiles.PROGRAMS", "decode.MANY_PROGRAMS"):
        monkeypatch.setattr(f"stl.kernels.{of}", programs)  # of few each takes several rows, the last fewer
    assert_operator_agrees(operands(shape, m, *basis), torch.float32, 2e-6)
    assert together
    assert all(rows > 1 for rows in together)


@pytest.mark.parametrize("row_axis", ROW_AXES)
@pytest.mark.parametrize("apart", ["samples", "features"])
def test_rows_of_tiles_of_samples_that_are_not_in_one_piece_are_side_by_side(apart, row_axis, together):
    shape = (32, 8, 96) if row_axis == "tokens" else (8, 32, 96)
    x, *layer = (tensor.float() for tensor in operands(shape, 160, "hadamard", 4, 16))
    x = x.mT.contiguous().mT if apart == "features" else x[::2] if row_axis == "tokens" else x[:, ::2]
    assert_operator_agrees([x, *layer], torch.float32, 2e-6, row_axis=row_axis)
    assert set(together) == {8, 16}


def test_groups_that_are_not_full_are_not_side_by_side(together):
    assert_operator_agrees(operands((32, 8, 20), 20, "strassen", 2, 7), torch.float32, 2e-6)
    assert set(together) == {1}


def test_nothing_is_read_behind_rows_that_end_with_a_tile():
    arguments = operands((2, 8, 60), 20, "hadamard", 4, 16)  # 15 tiles and, for alignment, one of zeros
    arguments[0] = F.pad(arguments[0].float(), (0, 4), value=float("nan"))[..., :60]
    assert_operator_agrees(arguments, torch.float32, 2e-6)


@pytest.mark.parametrize(
    ("basis", "dtype"), [*product(BASES, [torch.float16]), *product(BASES[1::3] if CPU else BASES, [torch.bfloat16])]
)
def test_noise_in_low_precision(basis, dtype):
    """As an approximate product no more than 1.5·√(½+S) times that of the dense one. (The interpreter cuts bf16 off
    where a GPU rounds.)"""
    assert_operator_agrees(operands((2, 16, 64), 64, *basis), dtype, 0.05)
    if CPU and dtype == torch.bfloat16:
        return
    matrices = get_basis(*basis)
    x, w = gaussian(96, 64, seed=4).to(dtype), gaussian(64, 64, seed=5).to(dtype)
    product = x.double() @ w.double()
    weight = encode_weight(w.cpu().double(), matrices.encode_w)
    arguments = [x, *(m.to(DEVICE, dtype) for m in (weight, matrices.encode_x, matrices.decode))]
    noise = stl_linear(*arguments, backend="triton").double() - stl_linear(*(m.double() for m in arguments))
    allowed = 1.5 * (0.5 + matrices.amplification) ** 0.5
    assert noise.norm() <= allowed * ((x @ w).double() - product).norm()


@pytest.mark.parametrize("row_axis", ROW_AXES)
def test_the_layout_of_the_inputs_does_not_matter(row_axis):
    arguments = [tensor.float() for tensor in operands((3, 5, 7), 6, "hadamard", 4, 16)]  # to which no copy is needed
    strided = [torch.stack([a, a * float("nan")], -1)[..., 0] for a in arguments]
    transposed = [a.T.contiguous().T if a.ndim == 2 else a.mT.contiguous().mT if a.ndim == 3 else a for a in arguments]
    expanded = [arguments[0][:1].expand(3, 5, 7), *arguments[1:]]
    for changed in (strided, transposed, expanded, [*arguments[:-1], arguments[-1][:1].expand(6)]):
        assert not all(tensor.is_contiguous() for tensor in changed)
        assert_operator_agrees(changed, torch.float32, 2e-6, row_axis=row_axis)


@pytest.mark.parametrize("row_axis", ROW_AXES)
@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (3, 0, 5, 6), (0, 6)])
def test_empty_inputs(shape, row_axis):
    arguments = operands(shape, 7, "hadamard", 2, 4)
    y, dx, *gradients = operator_results(arguments, torch.float32, row_axis=row_axis, backend="triton")
    assert y.shape == (*shape[:-1], 7)
    assert dx.shape == shape
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 20 GB of memory")
@pytest.mark.parametrize("row_axis", ROW_AXES)
def test_more_than_two_to_the_31_elements(row_axis):
    samples = 2**31 // (8 * 512) + 4
    x = torch.randn(samples, 8, 512, dtype=torch.bfloat16, device=DEVICE)
    arguments = [tensor.bfloat16() for tensor in operands((1, 8, 512), 512, "hadamard", 4, 16)[1:]]  # none is narrow
    y = stl_linear(x, *arguments, row_axis=row_axis, backend="triton")
    last = stl_linear(x[-4:], *arguments, row_axis=row_axis, backend="triton")
    assert torch.equal(y[-4:], last)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 30 GB of memory")
def test_channels_beyond_two_to_the_31_elements():
    samples = 2**31 // 16 + 10  # of one token, each a row of tiles of its own
    arguments = [tensor.bfloat16() for tensor in operands((1, 4), 4, "hadamard", 4, 16)[1:]]
    x = torch.randn(samples, 4, dtype=torch.bfloat16, device=DEVICE)
    y = stl_linear(x.unsqueeze(1), *arguments, backend="triton")
    assert torch.equal(y[-4:], stl_linear(x[-4:].unsqueeze(1), *arguments, backend="triton"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_cuda_graph_gives_for_other_numbers_what_a_call_gives():
    arguments = [tensor.float().requires_grad_() for tensor in operands((3, 13, 40), 24, "frame", 4, 24)]

    def run() -> list[Tensor]:
        y = stl_linear(*arguments, backend="triton")
        return [y, *torch.autograd.grad(y.square().sum(), arguments)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    with torch.cuda.graph(graph):
        replayed = run()
    with torch.no_grad():
        arguments[0].copy_(gaussian(3, 13, 40, seed=7))
    graph.replay()
    for got, wanted in zip(replayed, run(), strict=True):
        assert torch.equal(got, wanted)


def test_the_operators_keep_the_rules_of_pytorch():
    x, weight, encoder, decoder, bias = (t.float() for t in operands((2, 5, 7), 6, "hadamard", 4, 16))
    arguments = [tensor.requires_grad_() for tensor in (x, weight, encoder)]
    torch.library.opcheck(torch.ops.stl.encode_gemm, (*arguments, True))
    channels = torch.ops.stl.encode_gemm(x, weight, encoder, False).detach()
    for own in (bias, None):
        arguments = [tensor if tensor is None else tensor.requires_grad_() for tensor in (channels, decoder, own)]
        torch.library.opcheck(torch.ops.stl.decode, (*arguments, None, 2, 5, 6, False))


def test_compiles_without_graph_breaks_and_exports():
    arguments = [tensor.float() for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16)]

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stl_linear(x, *arguments[1:], backend="triton").relu()

    torch.compiler.reset()
    wanted = Module()(arguments[0])
    torch.testing.assert_close(
        torch.compile(Module(), fullgraph=True, backend="aot_eager")(arguments[0]), wanted, rtol=0, atol=0
    )
    exported = torch.export.export(Module(), (arguments[0],))
    assert "stl.encode_gemm" in str(exported.graph)
    torch.testing.assert_close(exported.module()(arguments[0]), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    arguments = [tensor.float().requires_grad_() for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16)]
    with torch.autocast(DEVICE, dtype):
        y = stl_linear(*arguments, backend="triton")
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y.float().square().sum(), arguments)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def flops_of(arguments: list[Tensor], **options) -> tuple[int, int]:
    """Those that PyTorch counts in the forward and in the backward pass."""
    with FlopCounterMode(display=False) as counter:
        y = stl_linear(*arguments, **options)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("row_axis", ROW_AXES)
@pytest.mark.parametrize("train_basis", [True, False])
def test_the_counted_flops_are_those_of_the_reference_and_of_encoding_again(row_axis, train_basis):
    arguments = [tensor.float().requires_grad_() for tensor in operands((3, 6, 7), 10, "hadamard", 4, 16)]
    for matrix in arguments[2:4]:
        matrix.requires_grad_(train_basis)

    (forward, backward), (wanted, wanted_backward) = (
        flops_of(arguments, row_axis=row_axis, backend=backend) for backend in ("triton", "torch")
    )
    tiles = 3 * 2 * 2 if row_axis == "tokens" else 6 * 1 * 2
    encode = 2 * tiles * 16 * 16
    assert forward == wanted
    assert backward == wanted_backward + encode * (1 if train_basis else 2)


@pytest.mark.parametrize("frozen", [(), (2, 3), (0,), (1, 2, 3), (4,)])
def test_frozen_arguments_have_no_gradient(frozen):
    arguments = [tensor.float().requires_grad_() for tensor in operands((2, 5, 7), 6, "hadamard", 4, 16)]
    for index in frozen:
        arguments[index].requires_grad_(False)
    trained = [tensor for tensor in arguments if tensor.requires_grad]
    for got, wanted in zip(
        torch.autograd.grad(stl_linear(*arguments, backend="triton").square().sum(), trained),
        torch.autograd.grad(stl_linear(*arguments).square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("train_basis", [True, False])
def test_the_backward_pass_keeps_x_and_only_for_the_decoder_the_channels(train_basis):
    arguments = [tensor.float().requires_grad_() for tensor in operands((2, 8, 16), 8, "hadamard", 4, 16)]
    for matrix in arguments[2:4]:
        matrix.requires_grad_(train_basis)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        stl_linear(*arguments, backend="triton")
    activations = sum(kept.values()) - sum(tensor.numel() for tensor in arguments[1:4])
    assert activations == 2 * 8 * 16 + train_basis * (2 * 8 * 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float64}, "no dtype torch.float64, only torch.bfloat16, torch.float16, torch.float32"),
        ({"tile": 3, "rank": 9}, "no tile 3, only 2, 4, 8"),
        ({"tile": 8, "rank": 65}, "ranks to 64 with tile=8, not 65"),
    ],
)
def test_what_there_is_no_kernel_for_gets_one_line(change, said):
    setting = {"dtype": torch.float32, "tile": 4, "rank": 16} | change
    basis = ("frame", setting["tile"], setting["rank"])
    arguments = [tensor.to(setting["dtype"]) for tensor in operands((2, 9), 9, *basis)]
    with pytest.raises(SettingError, match=said):
        stl_linear(*arguments, backend="triton")
    assert stl_linear(*arguments, backend="auto").shape == (2, 9)


def test_channels_of_small_tiles_that_registers_do_not_hold():
    assert kernels.use_triton("triton", torch.empty(4, device=DEVICE), 2, 8)
    with pytest.raises(SettingError, match="ranks to 8 with tile=2, not 9; use backend='auto'"):
        kernels.use_triton("triton", torch.empty(4, device=DEVICE), 2, 9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_autocast_makes_one_dtype_of_floating_point_ones_alone(which, dtype, backend):
    arguments = [tensor.float() for tensor in operands((2, 5, 9), 9, "hadamard", 4, 16)]
    arguments[which] = arguments[which].to(dtype)
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(SettingError, match=r"one dtype, outside of autocast|has no dtype"),
    ):
        stl_linear(*arguments, backend=backend)


def test_a_broken_triton_is_none(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('broken')")
    code = "import stl, torch; assert not stl.kernels.HAS_TRITON; "
    code += "stl.STLLinear(8, 8)(torch.ones(2, 4, 8)).sum().backward()"
    done = program("-c", code, env={"PYTHONPATH": str(tmp_path)}, fresh=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_or_triton_auto_says_nothing_and_triton_says_why(monkeypatch, recwarn):
    arguments = [tensor.float() for tensor in operands((2, 9), 9, "hadamard", 4, 16)]
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(SettingError, match="needs tensors on a GPU, x is on cpu"):
        stl_linear(*arguments, backend="triton")
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    with pytest.raises(SettingError, match="needs the package triton"):
        stl_linear(*arguments, backend="triton")
    stl_linear(*arguments)
    assert not recwarn


@pytest.mark.parametrize(
    ("dtype", "rank", "work", "training", "faster"),
    [
        (torch.bfloat16, 16, None, True, True),  # compiled or recorded
        (torch.float16, 64, None, False, True),
        (torch.bfloat16, 7, None, True, True),
        (torch.float32, 32, None, True, True),
        (torch.float32, 33, None, False, False),
        (torch.bfloat16, 16, 2**24, False, True),  # called one by one
        (torch.bfloat16, 16, 2**24, True, False),
        (torch.bfloat16, 16, 2**24 - 1, False, False),
        (torch.bfloat16, 16, 2**26, True, True),
    ],
)
def test_the_rule_of_auto(dtype, rank, work, training, faster):
    assert kernels.is_faster(dtype, rank, work, training) == faster


def test_encoded_numbers_are_those_of_the_narrower_side():
    x = torch.empty(3, 40, 64)
    assert kernels.encoded_numbers(x, 4, 16, None) == 3 * 10 * 16 * 16
    assert kernels.encoded_numbers(x, 4, 16, 128) == 3 * 10 * 16 * 16
    assert kernels.encoded_numbers(x, 4, 16, 32) == 3 * 10 * 8 * 16
    assert kernels.encoded_numbers(torch.empty(0), 4, 16, 32) == 0
    assert kernels.encoded_numbers(torch.tensor(1.0), 4, 16, 32) == 1  # which is refused later, with the reason


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_auto_takes_the_kernels_in_compiled_code():
    arguments = [tensor.bfloat16() for tensor in operands((2, 16, 64), 64, "hadamard", 4, 16)]
    graphs = []

    def keep(module: fx.GraphModule, _: list) -> Callable:
        graphs.append(str(module.graph))
        return module.forward

    torch.compiler.reset()
    y = torch.compile(stl_linear, fullgraph=True, backend=keep)(*arguments)
    assert "stl.encode_gemm" in graphs[0]
    torch.testing.assert_close(y, stl_linear(*arguments, backend="triton"))
    with FlopCounterMode(display=False) as counter:
        stl_linear(*arguments)
    assert torch.ops.stl.decode not in counter.get_flop_counts()["Global"]  # one small call


def test_the_operators_are_there_once_the_package_is():
    """FlopCounterMode counts, and torch.export loads, only what is registered before it begins."""
    names = ["encode_gemm", "decode", "hidden_gemm", "norm_encode_gemm"]
    done = program("-c", f"import stl, torch; [getattr(torch.ops.stl, name) for name in {names}]", fresh=True)
    assert done.returncode == 0, done.stderr
