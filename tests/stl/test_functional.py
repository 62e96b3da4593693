from itertools import product
from math import ceil, isqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stl import SettingError, get_basis, stl_linear, stl_matmul
from stl.functional import encode_weight, from_tiles, to_tiles

few = settings(deadline=None, derandomize=True, max_examples=25)

EXACT = [("strassen", 2, 7), ("exact48", 4, 48), ("strassen", 4, 49), ("strassen", 8, 343)]
sizes = st.integers(1, 20)
leads = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(
    k: int, m: int, tile: int, rank: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, encoder, decoder, bias; none of them special in any way."""
    return (
        gaussian(rank, ceil(k / tile), ceil(m / tile), seed=1, dtype=dtype),
        gaussian(rank, tile**2, seed=2, dtype=dtype),
        gaussian(rank, tile**2, seed=3, dtype=dtype),
        gaussian(m, seed=4, dtype=dtype),
    )


def naive_stl(x: Tensor, weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """Y_IJ = unvec(decoderᵀ · Σ_K (encoder·vec(X_IK)) ⊙ weight[:, K, J]) for one matrix x (n, k), tile by tile."""
    (n, k), t = x.shape, isqrt(encoder.shape[1])
    rows, inner, columns = ceil(n / t), ceil(k / t), ceil(m / t)
    padded = torch.zeros(rows * t, inner * t, dtype=x.dtype)
    padded[:n, :k] = x
    y = torch.zeros(rows * t, columns * t, dtype=x.dtype)
    for i, j in product(range(rows), range(columns)):
        total = torch.zeros(len(encoder), dtype=x.dtype)
        for b in range(inner):
            vec = padded[i * t : (i + 1) * t, b * t : (b + 1) * t].reshape(-1)
            total += (encoder @ vec) * weight[:, b, j]
        y[i * t : (i + 1) * t, j * t : (j + 1) * t] = (decoder.T @ total).reshape(t, t)
    y = y[:n, :m]
    return y if bias is None else y + bias


@pytest.mark.parametrize("choice", EXACT)
@given(lead=leads, n=sizes, k=sizes, m=sizes, seed=st.integers(0, 99))
@few
def test_an_exact_basis_multiplies_matrices(choice, lead, n, k, m, seed):
    x, w = gaussian(*lead, n, k, seed=seed), gaussian(k, m, seed=seed + 100)
    y = stl_matmul(x, w, get_basis(*choice))
    assert y.shape == (*lead, n, m)
    torch.testing.assert_close(y, x @ w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("k", [16, 100, 256])
@pytest.mark.parametrize(
    "choice",
    [
        ("hadamard", 4, 16),
        ("hadamard", 2, 4),
        ("frame", 4, 24),
        ("frame", 3, 13),
        ("products", 4, 48),
        ("products", 2, 3),
        ("random", 4, 24),
        ("random", 3, 20),
    ],
)
def test_the_error_of_an_inexact_product_is_the_error_of_its_basis(choice, k):
    basis = get_basis(*choice)
    x, w = gaussian(256, k, seed=5), gaussian(k, 256, seed=6)
    wanted = x @ w
    measured = ((stl_matmul(x, w, basis) - wanted).square().sum() / wanted.square().sum()).item()
    assert measured == pytest.approx(basis.error, rel=0.03)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    n=st.integers(1, 7),
    k=st.integers(1, 7),
    m=st.integers(1, 7),
    tile=st.integers(1, 3),
    rank=st.integers(1, 6),
    with_bias=st.booleans(),
)
@few
def test_tokens_agree_with_the_formula_tile_by_tile(lead, n, k, m, tile, rank, with_bias):
    x, (weight, encoder, decoder, bias) = gaussian(*lead, n, k), operands(k, m, tile, rank)
    bias = bias if with_bias else None
    y = stl_linear(x, weight, encoder, decoder, bias, out_features=m)
    wanted = [naive_stl(sample, weight, encoder, decoder, bias, m) for sample in x.reshape(-1, n, k)]
    torch.testing.assert_close(y, torch.stack(wanted).reshape(*lead, n, m))


@given(
    batch=st.integers(1, 7),
    positions=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    k=st.integers(1, 7),
    m=st.integers(1, 7),
    tile=st.integers(1, 3),
    rank=st.integers(1, 6),
    with_bias=st.booleans(),
)
@few
def test_batch_agrees_with_the_formula_tile_by_tile(batch, positions, k, m, tile, rank, with_bias):
    x, (weight, encoder, decoder, bias) = gaussian(batch, *positions, k), operands(k, m, tile, rank)
    bias = bias if with_bias else None
    y = stl_linear(x, weight, encoder, decoder, bias, row_axis="batch", out_features=m)
    flat = x.reshape(batch, -1, k)
    wanted = [naive_stl(flat[:, p], weight, encoder, decoder, bias, m) for p in range(flat.shape[1])]
    torch.testing.assert_close(y, torch.stack(wanted, 1).reshape(batch, *positions, m))


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (3, 0, 5, 6), (0, 6)])
def test_empty_inputs_give_empty_outputs(shape, row_axis):
    weight, encoder, decoder, bias = operands(6, 7, 2, 5)
    assert stl_linear(gaussian(*shape), weight, encoder, decoder, bias, row_axis=row_axis).shape == (*shape[:-1], 7)


def test_out_features_default_to_the_bias_and_else_to_whole_tiles():
    x, (weight, encoder, decoder, bias) = gaussian(3, 5), operands(5, 7, 4, 6)
    whole = stl_linear(x, weight, encoder, decoder)
    assert whole.shape == (3, 8)
    torch.testing.assert_close(stl_linear(x, weight, encoder, decoder, bias), whole[:, :7] + bias)
    torch.testing.assert_close(stl_linear(x, weight, encoder, decoder, out_features=5), whole[:, :5])


def test_tiles_are_row_major_and_padded_with_zeros():
    x = torch.arange(1, 7).view(2, 3)  # one row of two tiles, the second half empty
    assert to_tiles(x, 2).flatten(1).T.tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]
    assert to_tiles(x, 4).flatten(1).T.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0] + [0] * 8]


@given(lead=leads, n=sizes, m=sizes, tile=st.integers(1, 5))
@few
def test_from_tiles_undoes_to_tiles(lead, n, m, tile):
    x = gaussian(*lead, n, m)
    assert torch.equal(from_tiles(to_tiles(x, tile), n, m), x)


def test_encode_weight_is_encode_w_times_every_tile():
    w, encode_w = gaussian(5, 3), gaussian(7, 4, seed=1)
    encoded = encode_weight(w, encode_w)
    assert encoded.shape == (7, 3, 2)
    torch.testing.assert_close(encoded[:, 1, 0], encode_w @ w[2:4, :2].reshape(4))
    torch.testing.assert_close(encoded[:, 2, 1], encode_w @ torch.stack([w[4, 2], *w.new_zeros(3)]))


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_all_gradients_are_right(row_axis, with_bias):
    weight, encoder, decoder, bias = operands(5, 3, 2, 5)
    inputs = [gaussian(3, 3, 5, seed=9), weight, encoder, decoder, *([bias] if with_bias else [])]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *a: stl_linear(*a, row_axis=row_axis, out_features=3), inputs)


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_compiles_without_graph_breaks_and_again_for_other_sizes(row_axis):
    torch.compiler.reset()
    compiled = torch.compile(stl_linear, fullgraph=True, backend="aot_eager")
    for batch, tile in ((3, 2), (3, 4), (5, 4)):  # what changes becomes a symbolic size
        x, (weight, *rest) = gaussian(batch, 5, 7).requires_grad_(), operands(7, 5, tile, 6)
        weight.requires_grad_()
        y, wanted = compiled(x, weight, *rest, row_axis=row_axis), stl_linear(x, weight, *rest, row_axis=row_axis)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), (x, weight)) for z in (y, wanted)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("row_axis", "multiple"), [("tokens", 1), ("batch", 2)])
def test_exports_with_a_dynamic_batch(row_axis, multiple, strict):
    weight, *rest = operands(7, 6, 2, 7)

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stl_linear(x, weight, *rest, row_axis=row_axis)

    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(
        Module(), (gaussian(6, 5, 7),), dynamic_shapes=({0: multiple * batch},), strict=strict
    )
    x = gaussian(14, 5, 7)
    assert torch.equal(exported.module()(x), Module()(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_stays_near_double_precision(dtype, tolerance, row_axis, autocast):
    x, arguments = gaussian(4, 9, 11), operands(11, 6, 4, 16)
    wanted = stl_linear(x, *arguments, row_axis=row_axis)
    cast = [tensor.to(torch.float32 if autocast else dtype).requires_grad_() for tensor in (x, *arguments)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = stl_linear(*cast, row_axis=row_axis)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() < tolerance * wanted.norm()
    assert all(tensor.grad.dtype == tensor.dtype and tensor.grad.isfinite().all() for tensor in cast)


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("m", [6, 7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_output_is_contiguous_as_that_of_a_dense_layer(m, with_bias, row_axis):
    *arguments, bias = operands(7, m, 2, 5)
    y = stl_linear(gaussian(3, 5, 7), *arguments, bias if with_bias else None, row_axis=row_axis, out_features=m)
    assert y.is_contiguous()


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_the_layout_of_the_inputs_does_not_matter(row_axis):
    arguments = (gaussian(3, 5, 7), *operands(7, 6, 2, 5))
    wanted = stl_linear(*arguments, row_axis=row_axis)
    strided = [torch.stack([a, a * float("nan")], -1)[..., 0] for a in arguments]
    transposed = [a.T.contiguous().T if a.ndim == 2 else a.mT.contiguous().mT if a.ndim == 3 else a for a in arguments]
    expanded = arguments[0][:1].expand(3, 5, 7)
    assert not strided[0].is_contiguous()
    assert not transposed[0].is_contiguous()
    torch.testing.assert_close(stl_linear(*strided, row_axis=row_axis), wanted)
    torch.testing.assert_close(stl_linear(*transposed, row_axis=row_axis), wanted)
    torch.testing.assert_close(
        stl_linear(expanded, *arguments[1:], row_axis=row_axis),
        stl_linear(expanded.clone(), *arguments[1:], row_axis=row_axis),
    )


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


GOOD = {
    "x": zeros(3, 7),
    "weight": zeros(5, 4, 3),
    "encoder": zeros(5, 4),
    "decoder": zeros(5, 4),
    "bias": zeros(6),
}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"row_axis": "rows"}, ["row_axis='rows' is unknown", "tokens, batch"]),
        ({"backend": "cuda"}, ["backend='cuda' is unknown", "auto, torch"]),
        ({"bias": zeros(6).double()}, ["one dtype", "torch.float32, torch.float64"]),
        ({"x": zeros(3, 7).long()}, ["floating-point", "torch.int64"]),
        ({"weight": zeros(5, 4, 3).to("meta")}, ["one device", "cpu, meta"]),
        ({"weight": zeros(5, 12)}, ["weight (r, K, M)", "(5, 12)"]),
        ({"weight": zeros(6, 4, 3)}, ["weight (r, K, M)", "(6, 4, 3)"]),
        ({"encoder": zeros(6, 4)}, ["encoder (r, t²)", "(6, 4)"]),
        ({"encoder": zeros(20)}, ["encoder (r, t²)", "(20,)"]),
        ({"decoder": zeros(5, 9)}, ["decoder (r, t²)", "(5, 9)"]),
        ({"encoder": zeros(5, 6), "decoder": zeros(5, 6)}, ["6 columns", "square"]),
        ({"encoder": zeros(5, 0), "decoder": zeros(5, 0)}, ["0 columns", "square"]),
        ({"x": zeros(7)}, ["x has shape (7,)", "(..., n, k)"]),
        ({"x": zeros(3, 6)}, ["x has shape (3, 6)", "tile 2", "k from 7 to 8"]),
        ({"x": zeros(3, 9)}, ["x has shape (3, 9)", "k from 7 to 8"]),
        ({"bias": zeros(4)}, ["out_features=4", "bias (4,)", "5 to 6"]),
        ({"bias": zeros(6, 1)}, ["out_features=6", "bias (6, 1)"]),
        ({"out_features": 5}, ["out_features=5", "bias (6,)", "same length"]),
        ({"bias": None, "out_features": 7}, ["out_features=7 with no bias", "5 to 6"]),
        ({"bias": None, "out_features": 4}, ["out_features=4 with no bias", "5 to 6"]),
    ],
)
def test_arguments_that_do_not_fit_are_named_in_one_line(bad, said):
    assert stl_linear(**GOOD).shape == (3, 6)
    with pytest.raises(SettingError) as caught:
        stl_linear(**GOOD | bad)
    for text in said:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("x", "w"), [((3, 4), (5, 6)), ((4,), (4, 6)), ((3, 4), (4,)), ((3, 4), (2, 4, 6))])
def test_matmul_operands_that_do_not_fit_are_shown(x, w):
    with pytest.raises(SettingError) as caught:
        stl_matmul(torch.zeros(x), torch.zeros(w), get_basis("strassen", 2, 7))
    assert f"got {x} and {w}" in str(caught.value)
