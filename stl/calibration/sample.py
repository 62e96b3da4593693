"""The rows that a layer reads, sampled, and their effective rank."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stl.linear import STLLinear

MAX_TILES = 4096  # rows of tiles kept of a layer's input: 16384 rows at t = 4


class Tiles:
    """A bounded sample of the rows of tiles that a layer reads, cut as the layer cuts them.

    `rows` (N, t, k), where padded zero, or copies as the layer has them; `valid` (N, t), false there; `held_out` (N,).
    What is held out are other samples than those fitted, for rows of one sample are alike: of `batches` ≥ 4 every
    fourth; of fewer the last quarter of the samples of each call, or, where it has too few, the first batch; and only
    of a single sample its last rows.
    """

    def __init__(self, layer: STLLinear, batches: int) -> None:
        self._layer, self._batches = layer, batches
        self._generator = torch.Generator().manual_seed(0)
        like = layer.weight.detach()
        like = like if like.dtype == torch.float64 else like.float()
        self.rows = like.new_empty(0, layer.tile, layer.in_features)
        self.valid = torch.empty(0, layer.tile, dtype=torch.bool, device=like.device)
        self.held_out = torch.empty(0, dtype=torch.bool, device=like.device)
        self._lots = torch.empty(0)

    def add(self, name: str, number: int, x: Tensor) -> None:
        tile, x = self._layer.tile, self._layer.with_rows(x)
        n = x.shape[0 if self._layer.row_axis == "batch" else -2]
        if self._layer.lacks_samples(x):
            x = self._layer.with_copies(x)
        if self._layer.row_axis == "batch":
            x = x.movedim(0, -2)
        rows = pad(x, (0, 0, 0, -x.shape[-2] % tile)).unflatten(-2, (-(-n // tile), tile))  # (..., N, t, k)
        valid = (torch.arange(rows.shape[-3] * tile, device=x.device) < n).view(-1, tile).expand(rows.shape[:-1])
        if self._layer.row_axis == "batch":  # the samples first, so that the last tiles are the last samples
            rows, valid = rows.movedim(-3, 0), valid.movedim(-2, 0)
        samples = len(rows)
        rows, valid = rows.reshape(-1, tile, x.shape[-1]), valid.reshape(-1, tile)
        place = torch.arange(len(rows), device=x.device)
        if self._batches >= 4 or (self._batches > 1 and samples < 4):
            held_out = torch.full_like(place, number % 4 == 0)
        else:
            held_out = place >= (len(rows) // samples * (samples * 3 // 4) if samples > 1 else len(rows) * 3 // 4)
        # Keeping those with the smallest lots makes a uniform sample of all tiles, however many calls there are.
        lots = torch.cat([self._lots, torch.rand(len(rows), generator=self._generator)])
        keep = lots.argsort()[:MAX_TILES].sort().values
        self._lots = lots[keep]
        keep = keep.to(x.device)
        self.rows = torch.cat([self.rows, rows.to(self.rows)])[keep]
        self.valid = torch.cat([self.valid, valid])[keep]
        self.held_out = torch.cat([self.held_out, held_out.bool()])[keep]


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
