"""One layer: its ridge and steps, its weight, its encoder and decoder, and what that gained."""

from dataclasses import dataclass
from itertools import islice
from math import inf, isfinite, isnan, nan

import torch
from torch import Tensor

from stl.calibration.sample import Tiles, effective_rank
from stl.calibration.system import Problem, corrections
from stl.flops import stl_count
from stl.functional import stl_linear
from stl.linear import STLLinear

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)  # tried in this order; 1: as much weight as i.i.d. data of the same size
MAX_STEPS = 50
PATIENCE = 5  # steps without a held-out error lower by a thousandth before a ridge is given up
PROBED = 32  # columns of output tiles on which ridge and steps are chosen, for they are the same for all
BLOCK = 2**24  # numbers in the largest intermediate; the columns of output tiles are solved in blocks that fit
BASIS_STEPS = 300  # of Adam, on BASIS_TILES random rows of tiles each
BASIS_TILES = 256
BASIS_RATE = 4e-3  # at first, relative to the root mean square of the tensor; at the end a twentieth of it

ZERO = "its dense layer puts out nothing but zeros on the calibration data"
NOT_FINITE = "what its dense layer puts out on the calibration data overflows, or is NaN"


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration did to one layer.

    Attributes:
        rows: rows of input used, those held out among them.
        error_before, error_after: ‖stl(x) − dense(x)‖² / ‖dense(x)‖² on the held-out rows, biases aside, before and
            after calibration. Ridge and steps are chosen on the same rows.
        effective_rank: (Σλ)²/Σλ² over the eigenvalues λ of E[x·xᵀ], the k×k second moment of the input rows: k for
            white input, 1 where all rows are multiples of one. Both sums are estimated from pairs of distinct rows, so
            that fewer rows than features do not pass for a low rank.
        ridge, steps: chosen for the weight; both 0 where no choice lowered the held-out error by more than its standard
            error, and the weight stayed as it was.
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


def sure_gain(before: Tensor, after: Tensor) -> float:
    """How much lower `after` is than `before` in sum, less the standard error of that; both (N,), of held-out rows of
    tiles. Few rows show a lower error by chance; a single one shows nothing."""
    gains = (before - after).double()
    return (gains.sum() - len(gains) ** 0.5 * gains.std()).item() if len(gains) > 1 else -inf


class _Fit:
    """One layer with its fitted and its held-out rows."""

    def __init__(self, layer: STLLinear, dense: Tensor, tiles: Tiles) -> None:
        encoder, decoder = (tensor.to(tiles.rows) for tensor in layer.within_pivots(layer.encoder, layer.decoder))
        held = tiles.held_out
        self._layer, self._dense = layer, dense
        self._fitted = Problem(tiles.rows[~held], tiles.valid[~held], encoder, decoder)
        self._held_out = Problem(tiles.rows[held], tiles.valid[held], encoder, decoder)
        self._scale = self._fitted.scaling(encoder)
        self._like, self._rows = tiles.rows, int(held.sum())
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
        """The ridge and the number of steps with the largest `sure_gain`; (0, 0) where none has any."""
        weight, dense, inside = self.probe()
        residual = self._fitted.target(dense) - self._fitted.apply(weight, inside)
        held_out = self._held_out.target(dense) - self._held_out.apply(weight, inside)
        uncorrected = _by_row(held_out)
        largest, chosen = 0.0, (0.0, 0)
        for ridge in RIDGES:
            before, reached, since = largest, inf, 0
            steps = corrections(self._fitted, residual, inside, self._scale, ridge)
            for step, correction in enumerate(islice(steps, MAX_STEPS), 1):
                errors = _by_row(held_out - self._held_out.apply(correction, inside))
                error, gain = errors.sum().item(), sure_gain(uncorrected, errors)
                since += 1
                if error < 0.999 * reached:
                    reached, since = error, 0
                if gain > largest:
                    largest, chosen = gain, (ridge, step)
                if since == PATIENCE:
                    break
            if chosen != (0.0, 0) and largest == before:
                break  # weaker ridges overfit more
        return chosen

    def solve(self, ridge: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """The weight after so many steps, 0 included, and the held-out errors before and after, of every row of tiles
        (N,); their sums are the relative ones. All NaN where the dense layer puts out zeros, infinite where it
        overflows."""
        solved = torch.empty_like(self._layer.weight)
        energy, before, after = 0.0, *self._like.new_zeros(2, self._rows)
        _, blocks, _ = solved.shape
        width = max(1, BLOCK // (len(solved) * max(len(self._like), blocks)))
        for columns in torch.arange(self.columns, device=solved.device).split(width):
            weight, dense, inside = self._block(columns)
            target = self._held_out.target(dense)
            energy += target.square().sum().item()
            before += _by_row(target - self._held_out.apply(weight, inside))
            if steps:
                residual = self._fitted.target(dense) - self._fitted.apply(weight, inside)
                for correction in islice(corrections(self._fitted, residual, inside, self._scale, ridge), steps):
                    last = correction
                weight = weight + last
            solved[:, :, columns] = weight.to(solved)
            weight = solved[:, :, columns].to(weight)  # as rounded in the layer
            after += _by_row(target - self._held_out.apply(weight, inside))
        if not isfinite(energy):
            return solved, before.fill_(inf), after.fill_(inf)
        energy = energy or nan
        return solved, before / energy, after / energy


def _by_row(output: Tensor) -> Tensor:
    """The square of every row of tiles of an output (t², N, b)."""
    return output.square().sum((0, 2))


def fit_layer(
    name: str, layer: STLLinear, dense: Tensor, tiles: Tiles, shape: torch.Size, calibrate_basis: bool
) -> LayerCalibration | str:
    fitted, held_out = int((~tiles.held_out).sum()), int(tiles.held_out.sum())
    if not fitted or not held_out:
        return f"it saw {len(tiles.rows)} rows of tiles, too few to fit on some and hold out others"
    if not tiles.rows[~tiles.held_out].any():
        return ZERO
    fit = _Fit(layer, dense, tiles)
    ridge, steps = fit.choose()
    weight, before, after = fit.solve(ridge, steps)
    error_before = before.sum().item()
    if not isfinite(error_before):
        return ZERO if isnan(error_before) else NOT_FINITE
    if sure_gain(before, after) > 0:
        layer.weight.copy_(weight)
    else:
        ridge, steps, after = 0.0, 0, before
    if calibrate_basis:
        kept = layer.encoder.clone(), layer.decoder.clone()
        _fit_basis(layer, fit, tiles)
        fit = _Fit(layer, dense, tiles)
        again = fit.choose()
        weight, _, with_basis = fit.solve(*again)
        if sure_gain(after, with_basis) > 0:
            layer.weight.copy_(weight)
            (ridge, steps), after = again, with_basis
        else:
            layer.encoder.copy_(kept[0])
            layer.decoder.copy_(kept[1])
    count = stl_count(name, layer, shape)
    return LayerCalibration(
        rows=int(tiles.valid.sum()),
        error_before=error_before,
        error_after=after.sum().item(),
        effective_rank=effective_rank(tiles.rows[tiles.valid]),
        ridge=ridge,
        steps=steps,
        macs=count.macs / count.rows,
        dense_macs=count.dense_macs / count.rows,
    )


def _fit_basis(layer: STLLinear, fit: _Fit, tiles: Tiles) -> None:
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
            basis = layer.within_pivots(*fitted[1:])
            wrong = stl_linear(rows[some], fitted[0], *basis, backend="torch") - rows[some] @ dense
            loss = (wrong * valid[some] * true_columns).square().mean() / unit
            gradients = torch.autograd.grad(loss, fitted)
        for tensor, gradient in zip(fitted, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        scheduler.step()
    encoder, decoder = layer.within_pivots(*fitted[1:])
    layer.encoder.copy_(encoder)
    layer.decoder.copy_(decoder)
