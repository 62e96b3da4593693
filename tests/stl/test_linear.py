import copy
import io
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from stl import SettingError, STLLinear, get_basis, stl_linear

few = settings(deadline=None, derandomize=True, max_examples=25)

EXACT = [("strassen", 2, 7), ("exact48", 4, 48), ("strassen", 4, 49)]
INEXACT = [("hadamard", 4, 16), ("frame", 2, 6), ("random", 3, 11)]
SPEC = ("tile", "rank", "basis", "row_axis")


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(
    k: int = 7, m: int = 5, choice: tuple[str, int, int] = ("hadamard", 4, 16), bias: bool = True, **settings
) -> STLLinear:
    """A float64 layer whose every tensor is random."""
    name, tile, rank = choice
    torch.manual_seed(0)
    made = STLLinear(k, m, bias, basis=name, tile=tile, rank=rank, **{"dtype": torch.float64} | settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


@given(k=st.integers(1, 20), m=st.integers(1, 20), choice=st.sampled_from(EXACT + INEXACT), bias=st.booleans())
@few
def test_the_parameters_have_the_documented_shapes(k, m, choice, bias):
    name, tile, rank = choice
    made = STLLinear(k, m, bias, tile=tile, rank=rank, basis=name)
    assert made.weight.shape == (rank, ceil(k / tile), ceil(m / tile))
    assert made.encoder.shape == made.decoder.shape == (rank, tile**2)
    assert (made.bias is not None) == bias
    assert {n for n, _ in made.named_parameters()} == {"weight", "encoder", "decoder"} | ({"bias"} if bias else set())
    torch.testing.assert_close(made.encoder.double(), get_basis(name, tile, rank).encode_x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(made.decoder.double(), get_basis(name, tile, rank).decode, rtol=1e-6, atol=1e-7)
    assert bias is False or made.bias.eq(0).all()


def test_the_defaults_are_those_of_the_documentation():
    made = STLLinear(8, 4)
    assert (made.tile, made.rank, made.basis, made.row_axis) == (4, 16, "hadamard", "tokens")
    assert made.train_basis
    assert made.bias is not None


@pytest.mark.parametrize("choice", EXACT)
@given(k=st.integers(1, 20), m=st.integers(1, 20), bias=st.booleans(), lead=st.sampled_from([(), (3,), (2, 5)]))
@few
def test_from_linear_with_an_exact_basis_is_the_same_layer(choice, k, m, bias, lead):
    name, tile, rank = choice
    linear = nn.Linear(k, m, bias).double()
    x = gaussian(*lead, k)
    for row_axis in ("tokens", "batch"):
        made = STLLinear.from_linear(linear, basis=name, tile=tile, rank=rank, row_axis=row_axis)
        torch.testing.assert_close(made(x), linear(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("from_dense", [True, False])
def test_from_linear_keeps_dtype_mode_and_what_is_frozen(dtype, from_dense):
    linear = nn.Linear(6, 5).to(dtype).eval()
    linear.weight.requires_grad_(False)
    made = STLLinear.from_linear(linear, from_dense=from_dense, basis="strassen", tile=2, rank=7)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert not made.training
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["bias"]
    x = gaussian(3, 6, dtype=dtype)
    error = (made(x) - linear(x)).double().norm() / linear(x).double().norm()
    assert (error < 16 * torch.finfo(dtype).eps) == from_dense


def test_from_linear_of_another_layer_is_one_line():
    with pytest.raises(SettingError, match=r"^a Conv2d is no nn.Linear, and cannot become an STLLinear$"):
        STLLinear.from_linear(torch.nn.Conv2d(3, 3, 1), basis="exact48", rank=48)


def test_from_linear_on_the_meta_device_allocates_nothing():
    made = STLLinear.from_linear(nn.Linear(6, 5, device="meta"))
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}


def test_load_dense_refuses_another_shape():
    with pytest.raises(SettingError, match=r"dense weight \(7, 5\), needed \(5, 7\)"):
        layer().load_dense(torch.zeros(7, 5))


@pytest.mark.parametrize(
    "choice",
    [
        ("hadamard", 2, 4),
        ("hadamard", 4, 16),
        ("hadamard", 8, 64),
        ("frame", 2, 6),
        ("frame", 4, 24),
        ("frame", 8, 96),
        ("random", 2, 3),
        ("random", 4, 16),
        ("random", 4, 40),
        ("strassen", 4, 49),
    ],
)
@pytest.mark.parametrize("std", [None, 0.02])
@pytest.mark.parametrize("start", ["independent", "dense"])
def test_a_fresh_layer_gives_the_variance_of_a_dense_one(choice, std, start):
    name, tile, rank = choice
    k = 512
    torch.manual_seed(1)
    made = STLLinear(k, 512, basis=name, tile=tile, rank=rank, start=start)
    if std is not None:
        made.reset_parameters(std)
    with torch.no_grad():
        variance = made(gaussian(2, 256, k, dtype=torch.float32)).var().item()
    dense_variance = 1 / (3 * k) if std is None else std**2
    assert variance == pytest.approx(k * dense_variance, rel=0.03)


def test_a_dense_start_in_the_hadamard_basis_mixes_no_tokens():
    """All four token frequencies of a feature frequency begin with the same weight."""
    x = gaussian(1, 4, 64, dtype=torch.float32)
    with torch.no_grad():
        mixing, alone = (STLLinear(64, 64, start=start, bias=False) for start in ("independent", "dense"))
        changed = x.clone()
        changed[:, 1] += 1
        assert not torch.equal(mixing(changed)[:, 0], mixing(x)[:, 0])
        torch.testing.assert_close(alone(changed)[:, [0, 2, 3]], alone(x)[:, [0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_a_layer_changes_no_other_layer_and_no_basis(dtype):
    first, second = (STLLinear(8, 8, dtype=dtype) for _ in range(2))
    kept = {role: getattr(get_basis("hadamard"), role).clone() for role in ("encode_x", "encode_w", "decode")}
    other = copy.deepcopy(second.state_dict())
    with torch.no_grad():
        first.encoder.add_(1)
        assert not torch.equal(first.encoder, first.decoder)
        first.decoder.add_(2)
    assert all(torch.equal(getattr(get_basis("hadamard"), role), matrix) for role, matrix in kept.items())
    assert all(torch.equal(tensor, other[name]) for name, tensor in second.state_dict().items())


def test_reset_parameters_returns_to_the_basis():
    made = layer()
    made.reset_parameters()
    torch.testing.assert_close(made.encoder, get_basis("hadamard").encode_x, check_device=False)
    torch.testing.assert_close(made.decoder, get_basis("hadamard").decode, check_device=False)
    assert made.bias.eq(0).all()


@pytest.mark.parametrize("choice", INEXACT)
@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_the_layer_is_the_reference_function_of_its_tensors(choice, row_axis):
    made, x = layer(choice=choice, row_axis=row_axis), gaussian(3, 6, 7)
    wanted = stl_linear(x, made.weight, made.encoder, made.decoder, made.bias, row_axis=row_axis)
    assert torch.equal(made(x), wanted)


@pytest.mark.parametrize("choice", INEXACT)
@given(batch=st.integers(1, 9), k=st.integers(1, 9), m=st.integers(1, 9))
@few
def test_rows_of_a_2d_input_are_samples_and_never_mix(choice, batch, k, m):
    made, x = layer(k, m, choice), gaussian(batch, k)
    together = made(x)
    alone = torch.stack([made(sample) for sample in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together, made(x.unsqueeze(1)).squeeze(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("choice", INEXACT)
@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), data=st.data())
@few
def test_row_axis_tokens_keeps_samples_apart(choice, shape, data):
    made, x = layer(choice=choice), gaussian(*shape, 7)
    index = data.draw(st.integers(0, shape[0] - 1))
    others = torch.arange(shape[0]) != index
    before = made(x)
    x[index] = float("nan")  # survives any product: whatever it reaches shows
    after = made(x)
    assert torch.equal(after[others], before[others])
    assert after[index].isnan().any()
    torch.testing.assert_close(made(x[others]), before[others], rtol=0, atol=1e-12)


@pytest.mark.parametrize("choice", INEXACT)
@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), data=st.data())
@few
def test_row_axis_batch_keeps_positions_apart(choice, shape, data):
    made, x = layer(choice=choice, row_axis="batch"), gaussian(*shape, 7)
    sample, position = (data.draw(st.integers(0, size - 1)) for size in shape)
    others = torch.arange(shape[1]) != position
    before = made(x)
    x[sample, position] = float("nan")
    after = made(x)
    assert torch.equal(after[:, others], before[:, others])
    assert after[:, position].isnan().any()


@pytest.mark.parametrize("choice", INEXACT)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3))
@few
def test_the_samples_again_fill_the_last_tile_over_the_batch_where_asked(choice, shape):
    made = {fill: layer(choice=choice, row_axis="batch", fill=fill) for fill in ("zeros", "copies")}
    x, residual = gaussian(*shape, 7), gaussian(*shape, 5, seed=1)
    again = torch.arange(ceil(len(x) / choice[1]) * choice[1]) % len(x)
    got, wanted = made["copies"](x, residual), made["zeros"](x[again], residual[again])[: len(x)]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert len(x) % choice[1] == 0 or not torch.allclose(got, made["zeros"](x, residual))


def test_one_vector_is_one_sample_to_be_filled_up():
    made, x = layer(row_axis="batch", fill="copies"), gaussian(7)
    torch.testing.assert_close(made(x), made(x.repeat(4, 1))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_gradients_are_those_of_the_copies(samples):
    made, x = layer(row_axis="batch", fill="copies"), gaussian(samples, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: made(*given), (x, gaussian(samples, 3, 5).requires_grad_()))


def test_inexact_bases_do_mix_the_rows_of_a_tile():
    """What the tests above exclude does happen inside a tile: they could fail."""
    x = gaussian(5, 5, 7)
    changed = x.clone()
    changed[0, 0] += 1
    moved = (layer()(changed) - layer()(x)).ne(0).any(-1)
    assert moved.nonzero().tolist() == [[0, token] for token in range(4)]
    moved = (layer(row_axis="batch")(changed) - layer(row_axis="batch")(x)).ne(0).any(-1)
    assert moved.nonzero().tolist() == [[sample, 0] for sample in range(4)]


def test_gradients_reach_every_parameter():
    made = layer(dtype=torch.float32)
    made(gaussian(2, 3, 7, dtype=torch.float32)).square().sum().backward()
    assert all(p.grad.norm() > 0 for p in made.parameters())


def test_a_fixed_basis_is_a_buffer():
    made = layer(train_basis=False)
    assert not made.train_basis
    assert {n for n, _ in made.named_parameters()} == {"weight", "bias"}
    assert {n for n, _ in made.named_buffers()} == {"encoder", "decoder", "spec"}
    made(gaussian(2, 7)).sum().backward()
    assert made.encoder.grad is None
    trained = layer(train_basis=True)
    made.load_state_dict(trained.state_dict())  # the same keys either way
    torch.testing.assert_close(made(gaussian(2, 7)), trained(gaussian(2, 7)))


@pytest.mark.parametrize("train_basis", [True, False])
def test_extra_repr_names_every_setting(train_basis):
    made = STLLinear(7, 5, bias=False, tile=2, rank=6, basis="frame", row_axis="batch", train_basis=train_basis)
    assert repr(made) == (
        "STLLinear(in_features=7, out_features=5, bias=False, tile=2, rank=6, basis='frame', row_axis='batch', "
        f"train_basis={train_basis}, train_weight='encoded', fill='zeros')"
    )


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_compiles_without_graph_breaks(row_axis):
    made = layer(row_axis=row_axis)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    for shape in ((2, 5, 7), (3, 6, 7), (4, 7)):
        torch.testing.assert_close(compiled(gaussian(*shape)), made(gaussian(*shape)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("row_axis", "fill", "multiple"), [("tokens", "zeros", 1), ("batch", "copies", 2)])
def test_exports_with_a_dynamic_batch(row_axis, fill, multiple, strict):
    made, batch = layer(choice=("frame", 2, 6), row_axis=row_axis, fill=fill), torch.export.Dim("batch", max=64)
    exported = torch.export.export(made, (gaussian(6, 5, 7),), dynamic_shapes=({0: multiple * batch},), strict=strict)
    x = gaussian(14, 5, 7)
    assert torch.equal(exported.module()(x), made(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_a_dense_layer(dtype):
    x = gaussian(2, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        assert layer(dtype=torch.float32)(x).dtype == nn.Linear(7, 5)(x).dtype == dtype


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"in_features": 0}, "in_features=0 out_features=5 must both be positive"),
        ({"out_features": -1}, "in_features=7 out_features=-1 must both be positive"),
        ({"row_axis": "rows"}, "row_axis='rows' is unknown; choose one of tokens, batch"),
        ({"fill": "copy"}, "fill='copy' is unknown; choose one of zeros, copies"),
        ({"basis": "no"}, "basis='no' is unknown; choose one of"),
        ({"rank": 15}, "basis='hadamard' has no tile=4 rank=15; it has"),
        ({"tile": 0}, "tile=0 must be a positive whole number"),
    ],
)
def test_a_setting_that_does_not_exist_is_named(bad, said):
    with pytest.raises(SettingError) as caught:
        STLLinear(**{"in_features": 7, "out_features": 5} | bad)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 8), (3, 6), (2, 3, 5), ()])
@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_an_input_of_another_width_is_refused_even_inside_the_padding(shape, row_axis):
    with pytest.raises(SettingError) as caught:
        layer(7, 5, row_axis=row_axis)(gaussian(*shape))
    assert str(shape) in str(caught.value)
    assert "in_features=7" in str(caught.value)


def test_a_checkpoint_says_tile_rank_basis_and_row_axis():
    spec = bytes(layer(choice=("frame", 2, 6), row_axis="batch").state_dict()["spec"].tolist()).decode()
    assert {"tile=2", "rank=6", "basis=frame", "row_axis=batch"} <= set(spec.split())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("setting", "saved", "own"),
    [  # every pair differs in one setting; where they can, the shapes are the same
        ("tile", {"choice": ("products", 2, 6)}, {"choice": ("products", 3, 6)}),
        ("rank", {"choice": ("products", 2, 6)}, {"choice": ("products", 2, 7)}),
        ("basis", {"choice": ("products", 2, 6)}, {"choice": ("random", 2, 6)}),
        ("row_axis", {"row_axis": "tokens"}, {"row_axis": "batch"}),
        ("in", {"k": 7, "bias": False}, {"k": 8, "bias": False}),
        ("out", {"m": 7, "bias": False}, {"m": 8, "bias": False}),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_both_sides_shown(setting, saved, own, strict):
    saved, model = nn.ModuleDict({"mlp": layer(**saved)}), nn.ModuleDict({"mlp": layer(**own)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(saved.state_dict(), strict=strict)
    line = next(line for line in str(caught.value).splitlines() if "mlp: " in line)
    theirs, ours = line.split("the checkpoint has ")[1].split(", the model ")
    read = [dict(part.split("=") for part in side.split()) for side in (theirs, ours)]
    assert [name for name in read[0] if read[0][name] != read[1][name]] == [setting]
    for side, made in zip(read, (saved["mlp"], model["mlp"]), strict=True):
        assert {name: side[name] for name in SPEC} == {name: str(getattr(made, name)) for name in SPEC}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dense_checkpoint_is_refused_with_what_to_do():
    model = nn.ModuleDict({"mlp": layer()})
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(nn.ModuleDict({"mlp": nn.Linear(7, 5)}).state_dict())
    for text in ("mlp: ", "dense weight (5, 7)", "tile=4 rank=16 basis=hadamard row_axis=tokens", "from_dense=True"):
        assert text in str(caught.value)


def test_a_checkpoint_survives_a_file_that_is_read_without_running_code():
    saved, file = layer(row_axis="batch"), io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    fresh = STLLinear(7, 5, row_axis="batch", dtype=torch.float64)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(gaussian(3, 2, 7)), saved(gaussian(3, 2, 7)))


def test_the_longest_settings_fit_the_checkpoint():
    made = STLLinear(5, 3, tile=2, rank=4)
    made.in_features = made.out_features = 10**6
    made.basis, made.tile, made.rank, made.row_axis = "x" * 24, 16, 4096, "tokens"
    assert len(made._encode_spec()) == len(STLLinear(5, 3).spec)


def test_casting_leaves_the_settings_in_the_checkpoint():
    made = layer(row_axis="batch")
    layer(row_axis="batch").load_state_dict(made.half().state_dict())


def test_deepcopy_is_independent():
    made = layer()
    other = copy.deepcopy(made)
    assert torch.equal(other(gaussian(2, 7)), made(gaussian(2, 7)))
    with torch.no_grad():
        other.encoder.zero_()
    assert made.encoder.ne(0).any()


@pytest.mark.parametrize("train_basis", [True, False])
def test_an_ema_follows_and_can_be_loaded(train_basis):
    model = nn.Sequential(layer(train_basis=train_basis))
    ema = ModelEmaV3(model, decay=0.75)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    for name, tensor in ema.module.state_dict().items():
        moved = name in dict(model.named_parameters())
        torch.testing.assert_close(tensor, start[name] + 0.25 if moved else start[name])
    model.load_state_dict(ema.module.state_dict())
