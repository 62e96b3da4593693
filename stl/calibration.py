"""Encoded weights of trained layers from calibration data: least squares with the measured input covariance.

An STL layer's output is linear in its encoded weight. Let z_K = encoder·vec(x_K) be the encoded tiles of a row of
tiles and y_J the dense layer's output tiles for it. The encoded weight that minimises
E‖Σ_q decoder_q·Σ_K z_qK·weight_qKJ − y_J‖² solves one linear system for every J, all with the same matrix over the r·K
unknowns (q, K):

    A = (decoder·decoderᵀ)_qq' · E[z_qK·z_q'K'],   right-hand side  E[z_qK · ⟨decoder_q, vec(y_J)⟩]

With i.i.d. zero-mean input E[z_qK·z_q'K'] = σ²·(encoder·encoderᵀ)_qq'·δ_KK', and the system falls apart into one per
tile, G⁻¹h with G = (encoder·encoderᵀ) ∘ (decoder·decoderᵀ): `stl.basis.least_squares_encode_w`, which is what encoding
without data amounts to where the basis has the best encode_w. Correlated input couples the tiles of a row. A is too
large to form (r·K is 32768 for 4096 features at r=32, t=4) and singular wherever the data has fewer directions than
unknowns, so that its operator is applied instead: conjugate gradients for least squares (CGLS; Björck, "Numerical
Methods for Least Squares Problems", 1996, §7.4), which never forms A. They run in the coordinates in which i.i.d. input
makes A the identity, start from the uncalibrated weight, and a ridge pulls towards it: what the data leaves open stays
as it was. The ridge and the number of steps are those with the lowest error on held-out tiles.

Optionally the layer's own encoder and decoder are then fitted too, by Adam on the same objective, and the weight is
solved for again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stl.errors import SettingError
from stl.flops import stl_count
from stl.functional import stl_linear, to_tiles
from stl.linear import STLLinear

MAX_TILES = 4096  # rows of tiles kept of a layer's input: 16384 rows at t = 4
RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)  # tried in this order; 1: as much weight as i.i.d. data of the same size
MAX_STEPS = 50
PATIENCE = 5  # steps without a held-out error lower by a thousandth before a ridge is given up
PROBED = 32  # columns of output tiles on which ridge and steps are chosen, for they are the same for all
BLOCK = 2**24  # numbers in the largest intermediate; the columns of output tiles are solved in blocks that fit
BASIS_STEPS = 300  # of Adam, on BASIS_TILES random rows of tiles each
BASIS_TILES = 256
BASIS_RATE = 4e-3  # at first, relative to the root mean square of the tensor; at the end a twentieth of it
DEAD = 1e-4  # of the mean square of the input, below which that of a single column of tiles is not taken at its word

ZERO = "its dense layer puts out nothing but zeros on the calibration data"
ASSUMED = "no calibration data: the weights are encoded for i.i.d. zero-mean inputs"


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration did to one layer.

    Attributes:
        rows: rows of input used, a quarter of them held out.
        error_before, error_after: ‖stl(x) − dense(x)‖² / ‖dense(x)‖² on the held-out rows, biases aside, before and
            after calibration. Ridge and steps are chosen on the same rows.
        effective_rank: (Σλ)²/Σλ² over the eigenvalues λ of E[x·xᵀ], the k×k second moment of the input rows: k for
            white input, 1 where all rows are multiples of one. Both sums are estimated from pairs of distinct rows, so
            that fewer rows than features do not pass for a low rank.
        ridge, steps: chosen for the weight; both 0 where no choice lowered the held-out error.
        macs, dense_macs: multiply-accumulates a row, of the STL layer and of the dense one, as `stl.flops` counts them.
    """

    rows: int
    error_before: float
    error_after: float
    effective_rank: float
    ridge: float
    steps: int
    macs: float
    dense_macs: float

    def __str__(self) -> str:
        return (
            f"error {self.error_before:.4f} -> {self.error_after:.4f} on held-out rows, effective input rank "
            f"{self.effective_rank:.1f}, MACs a row {self.dense_macs:,.0f} -> {self.macs:,.0f}"
        )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: dict[str, tuple[STLLinear, nn.Linear]],
    calibration: Iterable[Any],
    calibrate_basis: bool = False,
) -> dict[str, LayerCalibration | str]:
    """Fit the weights of `layers`, name: (STL layer inside `model`, the dense layer that it replaces), in place.

    With `calibrate_basis` their encoders and decoders as well, wherever that lowers the held-out error.

    Layers are fitted in the order in which the model first runs them, each to its dense layer's output **on the input
    that it will see**, that of the model with all earlier layers calibrated. The other choice, the dense layer's output
    on the dense model's input, would make a layer undo the errors of earlier ones: its weight then depends on them, is
    no longer a copy of the dense one where the basis is exact, and has more to learn from the same rows.

    The batches are kept, and run through the model once for every layer and once more, in evaluation mode, without
    gradients. Of a layer's input at most `MAX_TILES` rows of tiles are kept, drawn with a fixed seed.

    Returns:
        For each name what was done, or why its weight stayed uncalibrated.

    Raises:
        SettingError: calibration that is empty, no series of batches or holds NaN; an input of a layer that is not
        finite; a model without values. Layers fitted by then keep their new weights.
    """
    device = _device(model)
    batches = _batches(calibration, device)
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, mode in training.items():
            stack.callback(setattr, module, "training", mode)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it would run around the layers
        model.eval()
        shapes = _run_order(model, layers, batches)
        done: dict[str, LayerCalibration | str] = dict.fromkeys(layers, "it saw no calibration data")
        for name, shape in shapes.items():
            layer, dense = layers[name]
            tiles = _Tiles(layer, whole_batches=len(batches) >= 4)
            _run(model, batches, {name: layer}, tiles.add)
            done[name] = _fit_layer(name, layer, dense.weight, tiles, shape, calibrate_basis)
    return done


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise SettingError(
            "calibration needs a model with values; this one is on the meta device: load its weights first"
        )
    return tensors[0].device


def _batches(calibration: Iterable[Any], device: torch.device) -> list[Tensor | dict[str, Any]]:
    """The batches as the model takes them, on its device."""
    if isinstance(calibration, Tensor | dict | str) or not isinstance(calibration, Iterable):
        raise SettingError(
            f"calibration is a {type(calibration).__name__}; it must be a series of batches: put a single one in a list"
        )
    batches: list[Tensor | dict[str, Any]] = []
    for number, batch in enumerate(calibration):
        content = batch[0] if isinstance(batch, tuple | list) and batch else batch  # (inputs, labels)
        if not isinstance(content, Tensor | dict):
            raise SettingError(
                f"calibration batch {number} is a {type(content).__name__}; a batch is a tensor, a tuple that starts "
                "with one, or a dict of keyword arguments"
            )
        tensors = {"": content} if isinstance(content, Tensor) else content
        for key, value in tensors.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                where = f" in {key!r}" if key else ""
                raise SettingError(f"calibration batch {number} holds NaN{where}; remove or repair its samples")
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in tensors.items()}
        batches.append(moved[""] if isinstance(content, Tensor) else moved)
    if not batches:
        raise SettingError("calibration holds no batches; pass at least one, or leave it out to convert without data")
    return batches


Hook = Callable[[str, int, Tensor], None]  # name of the layer, number of the batch, input


def _run(model: nn.Module, batches: list, layers: dict[str, STLLinear], hook: Hook) -> None:
    """Run the batches through the model and call `hook` at every call of one of the layers."""
    number = 0

    def watch(name: str, layer: STLLinear) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["x"]
            if not x.isfinite().all():
                raise SettingError(
                    f"calibration batch {number} gives layer {name!r} NaN or infinite inputs; check that batch, or "
                    "calibrate in float32"
                )
            hook(name, number, x)

        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)

    with ExitStack() as stack:
        for name, layer in layers.items():
            watch(name, layer)
        for number, batch in enumerate(batches):  # noqa: B007  # read by the hooks
            model(**batch) if isinstance(batch, dict) else model(batch)


def _run_order(
    model: nn.Module, layers: dict[str, tuple[STLLinear, nn.Linear]], batches: list
) -> dict[str, torch.Size]:
    """The shape of the first input of every layer that gets any, in the order in which they get it."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str, number: int, x: Tensor) -> None:
        if x.numel():
            shapes.setdefault(name, x.shape)

    _run(model, batches, {name: layer for name, (layer, _) in layers.items()}, note)
    return shapes


class _Tiles:
    """A bounded sample of the rows of tiles that a layer reads, cut as the layer cuts them.

    `rows` (N, t, k), zero where padded; `valid` (N, t); `held_out` (N,). Every fourth batch is held out, or, with
    `whole_batches` false, the last quarter of each call: its last samples, not neighbours of those fitted.
    """

    def __init__(self, layer: STLLinear, whole_batches: bool) -> None:
        self._layer, self._whole_batches = layer, whole_batches
        self._generator = torch.Generator().manual_seed(0)
        like = layer.weight.detach()
        like = like if like.dtype == torch.float64 else like.float()
        self.rows = like.new_empty(0, layer.tile, layer.in_features)
        self.valid = torch.empty(0, layer.tile, dtype=torch.bool, device=like.device)
        self.held_out = torch.empty(0, dtype=torch.bool, device=like.device)
        self._lots = torch.empty(0)

    def add(self, name: str, number: int, x: Tensor) -> None:
        tile, x = self._layer.tile, self._layer.with_rows(x)
        if self._layer.row_axis == "batch":
            x = x.movedim(0, -2)
        n = x.shape[-2]
        rows = pad(x, (0, 0, 0, -n % tile)).unflatten(-2, (-(-n // tile), tile))  # (..., N, t, k)
        valid = (torch.arange(rows.shape[-3] * tile, device=x.device) < n).view(-1, tile).expand(rows.shape[:-1])
        if self._layer.row_axis == "batch":  # the samples first, so that the last tiles are the last samples
            rows, valid = rows.movedim(-3, 0), valid.movedim(-2, 0)
        rows, valid = rows.reshape(-1, tile, x.shape[-1]), valid.reshape(-1, tile)
        place = torch.arange(len(rows), device=x.device)
        held_out = torch.full_like(place, number % 4 == 0) if self._whole_batches else place >= len(rows) * 3 // 4
        # Keeping those with the smallest lots makes a uniform sample of all tiles, however many calls there are.
        lots = torch.cat([self._lots, torch.rand(len(rows), generator=self._generator)])
        keep = lots.argsort()[:MAX_TILES].sort().values
        self._lots = lots[keep]
        keep = keep.to(x.device)
        self.rows = torch.cat([self.rows, rows.to(self.rows)])[keep]
        self.valid = torch.cat([self.valid, valid])[keep]
        self.held_out = torch.cat([self.held_out, held_out.bool()])[keep]


class Problem:
    """The linear map from an encoded weight to the layer's output tiles on given rows, and its adjoint.

    Only what the layer puts out counts: output in padded rows or columns is cut off there, and is zero here. `inside`
    (t², 1, b) is 1 for the entries of the b columns of output tiles that are true columns.
    """

    def __init__(self, rows: Tensor, valid: Tensor, encoder: Tensor, decoder: Tensor) -> None:
        """rows (N, t, k), zero where padded; valid (N, t), false where padded; encoder and decoder (r, t²)."""
        self.tile, self.decoder = rows.shape[1], decoder
        self._rows = rows.flatten(0, 1)
        tiles = to_tiles(self._rows, self.tile)
        self.power = tiles.square().mean((0, 1))  # (K,), the mean square of a column of tiles
        self._channels = (encoder @ tiles.flatten(1)).view(len(encoder), *tiles.shape[1:])  # (r, N, K)
        self._valid = valid.T.repeat_interleave(self.tile, 0).unsqueeze(-1).to(rows)  # (t², N, 1)

    def apply(self, weight: Tensor, inside: Tensor) -> Tensor:
        """(r, K, b) → (t², N, b)."""
        channels = torch.bmm(self._channels, weight)
        return (self.decoder.T @ channels.flatten(1)).view(-1, *channels.shape[1:]).mul_(self._valid).mul_(inside)

    def adjoint(self, output: Tensor) -> Tensor:
        """(t², N, b), zero where padded → (r, K, b)."""
        channels = (self.decoder @ output.flatten(1)).view(-1, *output.shape[1:])
        return torch.bmm(self._channels.mT, channels)

    def target(self, weight: Tensor) -> Tensor:
        """The output tiles (t², N, b) of a dense weight (k, b·t)."""
        return to_tiles(self._rows @ weight, self.tile)

    def scaling(self, encoder: Tensor) -> Callable[[Tensor], Tensor]:
        """The map S on (r, K, b) for which apply∘S is an isometry in the mean over i.i.d. inputs, up to padding.

        Then adjoint·apply is G ⊗ diag(N·power), with the G of the module's docstring. G is singular for some bases, and
        power is zero where an input is always zero: both are bounded below.
        """
        encode, decode = encoder.double(), self.decoder.double()
        values, vectors = torch.linalg.eigh((encode @ encode.T) * (decode @ decode.T))
        root = ((vectors * values.clamp_min(1e-6 * values[-1]).rsqrt()) @ vectors.T).to(encoder)
        power = self.power.clamp_min(DEAD * self.power.mean())
        columns = (self._channels.shape[1] * power).rsqrt()[:, None]
        return lambda weight: (root @ weight.flatten(1)).view_as(weight) * columns


def corrections(
    problem: Problem, residual: Tensor, inside: Tensor, scale: Callable[[Tensor], Tensor], ridge: float
) -> Iterator[Tensor]:
    """The iterates S·u (r, K, b) of CGLS for min ‖residual − apply(S·u)‖² + ridge·‖u‖², each column of b by itself."""
    gradient = scale(problem.adjoint(residual))
    solution, direction = torch.zeros_like(gradient), gradient
    norm = gradient.square().sum((0, 1))
    tiny = torch.finfo(norm.dtype).tiny  # a column that is solved already has 0/0 for its step, which must be 0
    while True:
        step = scale(direction)
        output = problem.apply(step, inside)
        curvature = output.square().sum((0, 1)) + ridge * direction.square().sum((0, 1))
        length = norm / curvature.clamp_min(tiny)
        solution = solution + length * direction
        residual = residual - length * output
        yield scale(solution)
        gradient = scale(problem.adjoint(residual)) - ridge * solution
        last, norm = norm, gradient.square().sum((0, 1))
        direction = gradient + (norm / last.clamp_min(tiny)) * direction


class _Fit:
    """One layer with its fitted and its held-out rows."""

    def __init__(self, layer: STLLinear, dense: Tensor, tiles: _Tiles) -> None:
        encoder, decoder = layer.encoder.to(tiles.rows), layer.decoder.to(tiles.rows)
        held = tiles.held_out
        self._layer, self._dense = layer, dense
        self._fitted = Problem(tiles.rows[~held], tiles.valid[~held], encoder, decoder)
        self._held_out = Problem(tiles.rows[held], tiles.valid[held], encoder, decoder)
        self._scale = self._fitted.scaling(encoder)
        self._like = tiles.rows
        self.columns = layer.weight.shape[2]

    def _block(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(encoded weight (r, K, b), dense weight (k, b·t), inside (t², 1, b)) of these columns of output tiles."""
        tile = self._layer.tile
        features = (columns[:, None] * tile + torch.arange(tile, device=columns.device)).flatten()
        inside = features < self._layer.out_features
        dense = self._like.new_zeros(self._layer.in_features, len(features))
        dense[:, inside] = self._dense[features[inside]].T.to(dense)
        mask = inside.view(-1, tile).T.repeat(tile, 1).unsqueeze(1).to(dense)
        return self._layer.weight[:, :, columns].to(dense), dense, mask

    def probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `_block` gives for some columns, spread over all of them."""
        count = min(self.columns, PROBED)
        return self._block(torch.linspace(0, self.columns - 1, count, device=self._like.device).long())

    def choose(self) -> tuple[float, int]:
        """The ridge and the number of steps with the lowest held-out error; (0, 0) where none lowers it."""
        weight, dense, inside = self.probe()
        residual = self._fitted.target(dense) - self._fitted.apply(weight, inside)
        held_out = self._held_out.target(dense) - self._held_out.apply(weight, inside)
        lowest, chosen = held_out.square().sum().item(), (0.0, 0)
        for ridge in RIDGES:
            before, reached, since = lowest, float("inf"), 0
            steps = corrections(self._fitted, residual, inside, self._scale, ridge)
            for step, correction in enumerate(islice(steps, MAX_STEPS), 1):
                error = (held_out - self._held_out.apply(correction, inside)).square().sum().item()
                since += 1
                if error < 0.999 * reached:
                    reached, since = error, 0
                if error < lowest:
                    lowest, chosen = error, (ridge, step)
                if since == PATIENCE:
                    break
            if chosen != (0.0, 0) and lowest == before:
                break  # weaker ridges overfit more
        return chosen

    def solve(self, ridge: float, steps: int) -> tuple[Tensor, float, float]:
        """The weight after so many steps, 0 included, and the relative held-out errors before and after."""
        solved = torch.empty_like(self._layer.weight)
        before = after = energy = 0.0
        _, blocks, _ = solved.shape
        width = max(1, BLOCK // (len(solved) * max(len(self._like), blocks)))
        for columns in torch.arange(self.columns, device=solved.device).split(width):
            weight, dense, inside = self._block(columns)
            target = self._held_out.target(dense)
            energy += target.square().sum().item()
            before += (target - self._held_out.apply(weight, inside)).square().sum().item()
            if steps:
                residual = self._fitted.target(dense) - self._fitted.apply(weight, inside)
                for correction in islice(corrections(self._fitted, residual, inside, self._scale, ridge), steps):
                    last = correction
                weight = weight + last
            solved[:, :, columns] = weight.to(solved)
            weight = solved[:, :, columns].to(weight)  # as rounded in the layer
            after += (target - self._held_out.apply(weight, inside)).square().sum().item()
        energy = energy or float("nan")
        return solved, before / energy, after / energy


def _fit_layer(
    name: str, layer: STLLinear, dense: Tensor, tiles: _Tiles, shape: torch.Size, calibrate_basis: bool
) -> LayerCalibration | str:
    fitted, held_out = int((~tiles.held_out).sum()), int(tiles.held_out.sum())
    if not fitted or not held_out:
        return f"it saw {len(tiles.rows)} rows of tiles, too few to fit on some and hold out others"
    if not tiles.rows[~tiles.held_out].any():
        return ZERO
    fit = _Fit(layer, dense, tiles)
    ridge, steps = fit.choose()
    weight, before, after = fit.solve(ridge, steps)
    if isnan(before):
        return ZERO
    if after < before:
        layer.weight.copy_(weight)
    else:
        ridge, steps, after = 0.0, 0, before
    if calibrate_basis:
        kept = layer.encoder.clone(), layer.decoder.clone()
        _fit_basis(layer, fit, tiles)
        fit = _Fit(layer, dense, tiles)
        again = fit.choose()
        weight, _, error = fit.solve(*again)
        if error < after:
            layer.weight.copy_(weight)
            (ridge, steps), after = again, error
        else:
            layer.encoder.copy_(kept[0])
            layer.decoder.copy_(kept[1])
    count = stl_count(name, layer, shape)
    return LayerCalibration(
        rows=int(tiles.valid.sum()),
        error_before=before,
        error_after=after,
        effective_rank=effective_rank(tiles.rows[tiles.valid]),
        ridge=ridge,
        steps=steps,
        macs=count.macs / count.rows,
        dense_macs=count.dense_macs / count.rows,
    )


def _fit_basis(layer: STLLinear, fit: _Fit, tiles: _Tiles) -> None:
    """Fit encoder and decoder, which all columns share, on some columns, whose weight moves along."""
    weight, dense, inside = fit.probe()
    rows, valid = tiles.rows[~tiles.held_out], tiles.valid[~tiles.held_out, :, None]
    true_columns = inside[: layer.tile, 0].T.flatten()
    unit = (rows @ dense).square().mean().clamp_min(torch.finfo(rows.dtype).tiny)
    fitted = [tensor.to(rows, copy=True).requires_grad_() for tensor in (weight, layer.encoder, layer.decoder)]
    rates = [BASIS_RATE * tensor.detach().square().mean().sqrt().item() for tensor in fitted]
    optimizer = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in zip(fitted, rates, strict=True)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.05 ** (1 / BASIS_STEPS))
    generator = torch.Generator().manual_seed(0)
    for _ in range(BASIS_STEPS):
        some = torch.randint(len(rows), (min(BASIS_TILES, len(rows)),), generator=generator).to(rows.device)
        with torch.enable_grad():
            wrong = stl_linear(rows[some], *fitted, backend="torch") - rows[some] @ dense
            loss = (wrong * valid[some] * true_columns).square().mean() / unit
            gradients = torch.autograd.grad(loss, fitted)
        for tensor, gradient in zip(fitted, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        scheduler.step()
    layer.encoder.copy_(fitted[1])
    layer.decoder.copy_(fitted[2])


def effective_rank(rows: Tensor) -> float:
    """(Σλ)²/Σλ² of E[x·xᵀ] for rows (n, k), see `LayerCalibration`; between 0 (all zero) and k."""
    n, k = rows.shape
    rows = rows / rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)
    norms = rows.square().sum(1).double()
    own = norms.square().sum()
    gram = (rows @ rows.T if n < k else rows.T @ rows).square_().sum(dtype=torch.float64)  # Σ_ij ⟨x_i, x_j⟩²
    if n == 1 or not own:
        return float(own > 0)
    # Without the pairs i = j, which say nothing of how directions are shared but dominate where there are few rows.
    pairs = (gram - own).item()
    return min(float(k), (norms.sum().square() - own).item() / pairs) if pairs > 0 else float(k)
