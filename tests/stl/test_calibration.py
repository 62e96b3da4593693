import copy
from itertools import islice

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stl import SettingError, STLLinear, convert, get_basis
from stl.basis import least_squares_encode_w
from stl.calibration import LayerCalibration
from stl.calibration.layer import sure_gain
from stl.calibration.sample import Tiles, effective_rank
from stl.calibration.system import Problem, corrections
from stl.functional import encode_weight

SETTINGS = {"tile": 2, "rank": 5, "basis": "frame", "from_dense": True}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(*shape: int, directions: int = 3, seed: int = 0) -> Tensor:
    """Rows close to a few directions, the same ones for every seed."""
    mix = gaussian(directions, shape[-1], seed=99)
    return gaussian(*shape[:-1], directions, seed=seed) @ mix + 0.05 * gaussian(*shape, seed=seed + 1)


def error(layer: STLLinear, dense: nn.Linear, x: Tensor) -> float:
    """Squared, relative to the dense output; biases aside."""
    with torch.no_grad():
        wanted = dense(x) - dense.bias
        return ((layer(x) - layer.bias - wanted).square().sum() / wanted.square().sum()).item()


def problem(rows: Tensor, basis) -> Problem:
    tiles = rows.unflatten(0, (-1, basis.tile))
    return Problem(tiles, torch.ones(tiles.shape[:2], dtype=torch.bool), basis.encode_x, basis.decode)


def solve(rows: Tensor, dense: Tensor, basis, start: Tensor, steps: int, ridge: float = 0.0) -> Tensor:
    """`dense` (k, m) fitted on rows (n, k), all of t a multiple."""
    fit = problem(rows, basis)
    inside = torch.ones(basis.tile**2, 1, start.shape[2], dtype=torch.float64)
    residual = fit.target(dense) - fit.apply(start, inside)
    *_, last = islice(corrections(fit, residual, inside, fit.scaling(basis.encode_x), ridge), steps)
    return start + last


def test_iid_input_leads_to_the_solution_tile_by_tile():
    basis, dense = get_basis("frame", 2, 5), gaussian(6, 4, seed=1)
    wanted = encode_weight(dense, least_squares_encode_w(basis.encode_x, basis.decode))
    distances = []
    for n in (400, 40000):
        solved = solve(gaussian(n, 6), dense, basis, torch.zeros_like(wanted), steps=40)
        distances.append(((solved - wanted).norm() / wanted.norm()).item())
    assert distances[1] < 0.02
    assert distances[1] < distances[0] / 4  # as 1/√n


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_small_case_equals_the_explicit_least_squares_solution(ridge):
    basis, dense, rows = get_basis("frame", 2, 5), gaussian(6, 4, seed=1), correlated(200, 6)
    fit = problem(rows, basis)
    start = gaussian(5, 3, 2, seed=2)
    inside = torch.ones(4, 1, 1, dtype=torch.float64)
    units = torch.eye(15, dtype=torch.float64).view(15, 5, 3, 1)
    scale = fit.scaling(basis.encode_x)
    matrix = torch.stack([fit.apply(scale(unit), inside).flatten() for unit in units], 1)
    residual = (fit.target(dense) - fit.apply(start, inside)).movedim(2, 0).flatten(1).T
    matrix = torch.cat([matrix, ridge**0.5 * torch.eye(15, dtype=torch.float64)])
    residual = torch.cat([residual, residual.new_zeros(15, 2)])
    explicit = scale(torch.linalg.lstsq(matrix, residual).solution.view(5, 3, 2))
    torch.testing.assert_close(solve(rows, dense, basis, start, 60, ridge), start + explicit, rtol=1e-6, atol=1e-6)


def test_the_operator_is_the_layer_and_its_adjoint_is_its_transpose():
    layer = STLLinear(7, 5, bias=False, tile=2, rank=5, basis="frame").double()
    with torch.no_grad():
        x = torch.cat([gaussian(3, 7), torch.zeros(1, 7)]).double()
        valid = torch.tensor([[True, True], [True, False]])
        fit = Problem(x.unflatten(0, (2, 2)), valid, layer.encoder, layer.decoder)
        inside = torch.ones(4, 1, 3, dtype=torch.float64)
        inside[[1, 3], :, 2] = 0  # five features are two and a half tiles
        output = fit.apply(layer.weight, inside)
        padded = nn.functional.pad(layer(x[None, :3])[0], (0, 1, 0, 1))
        torch.testing.assert_close(output.sum(), padded.sum())
        torch.testing.assert_close(output.square().sum(), padded.square().sum())
        other = gaussian(4, 2, 3) * output.ne(0)
        torch.testing.assert_close((other * output).sum(), (fit.adjoint(other) * layer.weight).sum())


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("shape", [(48, 5, 9), (40, 9), (6, 4, 8, 9)])
def test_correlated_input_has_a_lower_error_on_unseen_rows(row_axis, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    dense = model[0]
    uncalibrated = STLLinear.from_linear(dense, tile=2, rank=5, basis="frame", row_axis=row_axis)
    report = convert(model, row_axis=row_axis, calibration=[correlated(*shape)], **SETTINGS)
    done = report.calibrated["0"]
    assert isinstance(done, LayerCalibration)
    unseen = correlated(*shape, seed=7)
    before, after = error(uncalibrated, dense, unseen), error(model[0], dense, unseen)
    assert after < 0.7 * before
    assert done.error_before == pytest.approx(before, rel=0.5)
    assert done.error_after < 0.7 * done.error_before
    assert done.effective_rank < 4
    assert done.rows == torch.Size(shape[:-1]).numel()
    assert done.dense_macs == 9 * 7


def test_the_held_out_error_is_that_of_the_layer_on_the_held_out_rows():
    model = nn.Sequential(nn.Linear(9, 7)).double()
    dense, batches = model[0], [correlated(4, 5, 9, seed=10 * seed) for seed in range(5)]
    uncalibrated = STLLinear.from_linear(dense, tile=2, rank=5, basis="frame")
    done = convert(model, calibration=batches, **SETTINGS).calibrated["0"]
    held_out = torch.cat([batches[0], batches[4]])
    assert done.error_before == pytest.approx(error(uncalibrated, dense, held_out), rel=1e-9)
    assert done.error_after == pytest.approx(error(model[0], dense, held_out), rel=1e-9)


def test_hardly_any_data_does_not_make_the_layer_worse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).double()
    dense = model[0]
    uncalibrated = STLLinear.from_linear(dense, tile=2, rank=5, basis="frame")
    convert(model, calibration=[gaussian(6, 2, 64)], **SETTINGS)
    unseen = gaussian(200, 2, 64, seed=7)
    assert error(model[0], dense, unseen) < 1.01 * error(uncalibrated, dense, unseen)


@pytest.mark.parametrize("directions", [64, 3])
@pytest.mark.parametrize("samples", [1, 2])
def test_two_batches_of_tokens_alike_do_not_make_the_layer_worse(samples, directions):
    settings = {"tile": 4, "rank": 16, "basis": "frame"}
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 48)).double()
        dense = model[0]
        uncalibrated = STLLinear.from_linear(dense, **settings)

        def batch(seed: int, samples: int = samples) -> Tensor:
            """Samples whose tokens have more in common than what tells them apart."""
            common = correlated(samples, 1, 64, directions=directions, seed=seed)
            return common + 0.6 * correlated(samples, 8, 64, directions=directions, seed=seed + 1)

        convert(model, calibration=[batch(10), batch(20)], from_dense=True, **settings)
        before, after = (error(layer, dense, batch(30, samples=64)) for layer in (uncalibrated, model[0]))
        assert after < 1.01 * before
        assert directions == 64 or after < before


def test_samples_are_held_out_whole():
    layer = STLLinear(3, 3, tile=2, rank=4, basis="hadamard")
    for batches, sizes, held_out in (
        (1, [(1, 8)], [0]),  # the last row of tiles: there is no other sample
        (1, [(3, 8)], [2, 2, 2, 2]),
        (2, [(1, 8), (1, 8)], [0, 0, 0, 0]),
        (2, [(8, 3), (1, 3)], [6, 6, 7, 7]),
        (4, [(2, 3)] * 4, [0, 0, 1, 1]),
    ):
        tiles = Tiles(layer, batches)
        for number, (samples, tokens) in enumerate(sizes):
            marks = torch.arange(samples) + 10 * number
            tiles.add("", number, marks.view(-1, 1, 1).expand(samples, tokens, 3).float())
        marks = tiles.rows[tiles.held_out][:, 0, 0].int().tolist()
        assert marks == held_out


def test_tiles_hold_the_copies_that_the_layer_has_and_count_none_of_them():
    layer = STLLinear(3, 3, tile=4, rank=16, row_axis="batch", fill="copies")
    tiles = Tiles(layer, 4)
    tiles.add("", 1, torch.arange(6.0).view(6, 1, 1).expand(6, 2, 3))
    assert tiles.rows[..., 0].int().tolist() == [[0, 1, 2, 3]] * 2 + [[4, 5, 0, 1]] * 2
    assert tiles.valid.tolist() == [[True] * 4] * 2 + [[True, True, False, False]] * 2


def test_a_lower_error_counts_less_its_standard_error():
    before = torch.tensor([3.0, 2.0, 4.0, 1.0])
    assert sure_gain(before, before - 0.5) == pytest.approx(2.0)
    assert sure_gain(before, before - torch.tensor([1.0, 0.0, 1.0, 0.0])) == pytest.approx(2 - 2 * 3**-0.5)
    assert sure_gain(before, before - torch.tensor([2.0, -1.0, 0.0, 0.0])) < 0
    assert not sure_gain(before, before.fill_(torch.nan)) > 0
    assert sure_gain(before[:1], torch.zeros(1)) < 0


class Patches(nn.Module):
    """Digits as 16 patches of 2×2 pixels: an embedding, a transformer block, an MLP on each token, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 32)
        self.position = nn.Parameter(torch.randn(16, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x) + self.position).mean(1))


def digit_patches() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 8 - 1
    patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    return patches, torch.from_numpy(digits.target)


def test_trained_on_digits_every_layer_has_a_lower_error_on_held_out_images():
    torch.manual_seed(0)
    x, y = digit_patches()
    model = Patches()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for start in range(0, 6000, 60):
        batch = torch.arange(start, start + 60) % 1200
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    settings = {"tile": 4, "rank": 32, "basis": "als", "from_dense": True}
    uncalibrated, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    convert(uncalibrated, **settings)
    report = convert(calibrated, calibration=list(x[:240].split(60)), **settings)
    weights = {
        name: (layer.weight, layer.bias) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    attention = model.block.self_attn
    thirds = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    weights |= {f"block.self_attn.{role}_proj": pair for role, pair in zip("qkv", thirds, strict=True)}
    assert set(report.calibrated) == set(weights)
    # held-out images, and for both conversions the inputs that the layer sees in the calibrated model
    inputs = {}
    for name in weights:
        calibrated.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    with torch.no_grad():
        calibrated(x[1200:])
        for name, (weight, _) in weights.items():
            k, wanted, errors = weight.shape[1], inputs[name] @ weight.T, []
            for model in (uncalibrated, calibrated):
                layer = model.get_submodule(name)
                layer.bias.zero_()
                errors.append(((layer(inputs[name]) - wanted).square().sum() / wanted.square().sum()).item())
            assert errors[1] < 1.01 * errors[0], name
            assert report.calibrated[name].effective_rank >= k / 2 or errors[1] < errors[0], name
    assert sum(done.effective_rank < done.dense_macs**0.5 / 2 for done in report.calibrated.values()) >= 4


def test_with_an_exact_basis_nothing_is_left_to_fit(case):
    model, x = case.build(), case.batch(8)
    wanted = model(x)
    report = convert(model, basis="strassen", tile=2, rank=7, from_dense=True, calibration=[x])
    torch.testing.assert_close(model(x), wanted, rtol=1e-8, atol=1e-8)
    assert all(isinstance(done, LayerCalibration) and done.error_after < 1e-20 for done in report.calibrated.values())


def test_every_kind_of_model_and_its_attention_is_calibrated(case):
    model = case.build().train()
    again = copy.deepcopy(model)
    modes = {module.training for module in model.modules()}
    report = convert(model, calibration=[case.batch(8)], **SETTINGS)
    layers = {name for name, module in model.named_modules() if isinstance(module, STLLinear)}
    assert set(report.calibrated) == layers
    assert any(done.steps for done in report.calibrated.values())
    for name, done in report.calibrated.items():
        assert done.error_after <= done.error_before, name
    assert {module.training for module in model.modules()} == modes
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())
    convert(again, calibration=[case.batch(8)], **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_padding_mask_and_keywords_reach_the_model():
    block = nn.TransformerEncoderLayer(12, 2, 18, batch_first=True)
    model = nn.TransformerEncoder(block, num_layers=1).double().eval()
    mask = torch.tensor([[False] * 4 + [True]] * 8)
    batch = {"src": correlated(8, 5, 12), "src_key_padding_mask": mask}
    assert len(convert(model, calibration=[batch], **SETTINGS).calibrated) == 6


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.idle = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def test_a_layer_used_twice_is_fitted_to_both_of_its_inputs_and_an_idle_one_is_named():
    model = Twice().double()
    idle = STLLinear.from_linear(model.idle, tile=2, rank=5, basis="frame")
    report = convert(model, calibration=[correlated(16, 4, 6)], **SETTINGS)
    assert report.calibrated["a"] is report.calibrated["b"]
    assert report.calibrated["a"].rows == 2 * 16 * 4
    assert report.calibrated["idle"] == "it saw no calibration data"
    assert torch.equal(model.idle.weight, idle.weight)
    assert "uncalibrated idle: it saw no calibration data" in str(report)


def test_later_layers_are_fitted_to_what_earlier_ones_now_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    dense, x = model[2], correlated(16, 4, 8)
    done = convert(model, calibration=[x[:4], x[4:8], x[8:12], x[12:]], **SETTINGS).calibrated["2"]
    with torch.no_grad():
        seen = model[1](model[0](x[:4]))
    assert done.error_after == pytest.approx(error(model[2], dense, seen), rel=1e-9)


def test_without_data_the_report_says_what_was_assumed():
    model = nn.Sequential(nn.Linear(4, 4))
    assert "i.i.d. zero-mean inputs" in str(convert(copy.deepcopy(model), tile=2, rank=4, from_dense=True))
    assert "i.i.d." not in str(convert(model, tile=2, rank=4))


def test_batches_are_taken_as_a_loader_gives_them():
    torch.manual_seed(0)
    x, weights = correlated(32, 3, 8), []
    pairs = torch.utils.data.TensorDataset(x, torch.zeros(32))
    for batches in (
        list(x.split(4)),
        iter(x.split(4)),
        torch.utils.data.DataLoader(pairs, 4),
        [[b] for b in x.split(4)],
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8)).double()
        convert(model, calibration=batches, **SETTINGS)
        weights.append(model[0].weight)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_only_a_bounded_sample_of_the_rows_is_kept(monkeypatch):
    monkeypatch.setattr("stl.calibration.sample.MAX_TILES", 40)
    model = nn.Sequential(nn.Linear(8, 8)).double()
    done = convert(model, calibration=list(correlated(64, 8, 8).split(8)), **SETTINGS).calibrated["0"]
    assert done.rows == 2 * 40
    assert done.error_after < done.error_before


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "calibration holds no batches"),
        (iter([]), "calibration holds no batches"),
        (torch.ones(4, 8), "put a single one in a list"),
        ({"input": torch.ones(4, 8)}, "put a single one in a list"),
        (3, "calibration is a int"),
        ([torch.ones(4, 8), "text"], "calibration batch 1 is a str"),
        ([torch.ones(4, 8), torch.full((4, 8), float("nan"))], "calibration batch 1 holds NaN"),
        ([{"input": torch.full((4, 8), float("nan"))}], "holds NaN in 'input'"),
        ([torch.full((4, 8), float("inf"))], "batch 0 gives layer '0' NaN or infinite inputs"),
    ],
)
def test_bad_data_is_refused_and_the_model_stays(batches, said):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    layers, state = list(model), copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=said) as caught:
        convert(model, calibration=batches, **SETTINGS)
    assert "\n" not in str(caught.value)
    assert list(model) == layers
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_calibration_needs_trained_weights():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(SettingError, match="pass from_dense=True"):
        convert(model, tile=2, rank=4, calibration=[torch.ones(4, 8)])
    with pytest.raises(SettingError, match="pass calibration=batches as well"):
        convert(model, calibrate_basis=True, **SETTINGS)
    with pytest.raises(SettingError, match="meta device"):
        convert(nn.Sequential(nn.Linear(8, 8, device="meta")), calibration=[torch.ones(4, 8)], **SETTINGS)
    assert type(model[0]) is nn.Linear


class Breaks(nn.Module):
    """Fails in the given forward pass, counted from 1: the first notes the layers, the next calibrate one each."""

    def __init__(self, at: int) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.encoder, self.at = nn.TransformerEncoder(block, 1), at

    def forward(self, x: Tensor) -> Tensor:
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("broken")
        return self.encoder(x)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_error_on_the_way_leaves_the_model_as_it_was(at):
    model = Breaks(at).double()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="broken"):
        convert(model, calibration=[gaussian(4, 4, 8)], **SETTINGS)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.encoder.use_nested_tensor
    assert model.encoder.layers[0].activation_relu_or_gelu
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("x", [torch.zeros(8, 2, 8), torch.ones(1, 1, 8)])
def test_data_that_says_nothing_leaves_the_layer_uncalibrated(x):
    model = nn.Sequential(nn.Linear(8, 8))
    uncalibrated = STLLinear.from_linear(model[0], tile=2, rank=5, basis="frame")
    assert isinstance(convert(model, calibration=[x], **SETTINGS).calibrated["0"], str)
    assert torch.equal(model[0].weight, uncalibrated.weight)


def test_rows_all_the_same_and_a_dead_feature_are_no_trouble():
    torch.manual_seed(0)
    x = gaussian(8).expand(8, 4, 8).clone()
    x[..., :2] = 0
    model = nn.Sequential(nn.Linear(8, 8)).double()
    done = convert(model, calibration=[x], **SETTINGS).calibrated["0"]
    assert model[0].weight.isfinite().all()
    assert done.error_after < 1e-3
    assert done.effective_rank == pytest.approx(1)


@pytest.mark.parametrize("train_basis", [True, False])
def test_the_basis_may_be_fitted_too(train_basis):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(9, 7)).double(), correlated(40, 5, 9, directions=6)
    dense, plain, settings = model[0], copy.deepcopy(model), SETTINGS | {"train_basis": train_basis}
    convert(plain, calibration=[x], **settings)
    done = convert(model, calibration=[x], calibrate_basis=True, **settings).calibrated["0"]
    unseen = correlated(40, 5, 9, directions=6, seed=7)
    assert error(model[0], dense, unseen) < 0.7 * error(plain[0], dense, unseen)
    assert done.error_after == pytest.approx(error(model[0], dense, x[30:]), rel=1e-9)
    assert model[0].train_basis == train_basis
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_basis_that_is_exact_stays():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    layer = STLLinear.from_linear(model[0], tile=2, rank=7, basis="strassen")
    settings = {"tile": 2, "rank": 7, "basis": "strassen", "from_dense": True}
    done = convert(model, calibration=[gaussian(8, 4, 8)], calibrate_basis=True, **settings).calibrated["0"]
    assert done.error_after < 1e-20
    torch.testing.assert_close(model[0].encoder, layer.encoder, rtol=0, atol=1e-6)


def test_bf16_stays_bf16():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    done = convert(model, calibration=[correlated(32, 4, 8).bfloat16()], **SETTINGS).calibrated["0"]
    assert model[0].weight.dtype == torch.bfloat16
    assert done.error_after < done.error_before


def test_effective_rank_counts_the_directions():
    assert effective_rank(gaussian(20000, 10)) == pytest.approx(10, rel=0.05)
    assert effective_rank(gaussian(500, 500)) == pytest.approx(500, rel=0.05)  # though there are as few rows
    assert effective_rank(gaussian(2000, 3) @ torch.linalg.qr(gaussian(40, 3, seed=1)).Q.T) == pytest.approx(3, rel=0.1)
    assert effective_rank(torch.ones(5, 4)) == pytest.approx(1)
    assert effective_rank(torch.ones(1, 4)) == 1
    assert effective_rank(torch.zeros(5, 4)) == 0


def test_a_layer_that_overflows_is_said_to():
    model = nn.Sequential(nn.Linear(8, 8))
    report = convert(
        model, tile=2, rank=4, basis="hadamard", from_dense=True, calibration=[torch.full((2, 16, 8), 1e25)] * 4
    )
    assert "overflows" in str(report)


def test_weights_that_are_not_finite_get_one_line():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(SettingError, match="layer '0' has NaN or infinite weights"):
        convert(model, tile=2, rank=4, from_dense=True)
