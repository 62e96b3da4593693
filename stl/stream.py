"""The rows that a layer has seen of a sequence that comes in parts, as far as it needs them again."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stl.errors import SettingError
from stl.normalisation import Norm

Compute = Callable[[Tensor, Tensor | None, Norm | None], Tensor]


class Stream:
    """Cuts tiles as if all parts came at once: the incomplete last tile is kept, and computed again with what follows.

    `seen` rows have come, of which the last `seen` mod t are kept, unless they were only counted. `calls` counts the
    parts, and is set back by whom it serves.
    """

    def __init__(self, name: str, tile: int) -> None:
        self.name, self._tile = name, tile
        self.reset()

    def reset(self) -> None:
        self.seen = self.calls = 0
        self._kept: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None, norm: Norm | None, compute: Compute) -> Tensor:
        """What `compute` gives for n new rows x (..., n, k), a residual of them (..., n, m) and a norm: (..., n, m).

        Rows are kept as the norm leaves them, whoever applies it to the next. Raises SettingError where other axes than
        the rows changed since the last part.
        """
        kept = x[..., :0, :] if self._kept is None else self._kept
        if kept.shape[:-2] != x.shape[:-2]:
            raise SettingError(
                f"layer {self.name!r} was streaming sequences of shape {tuple(kept.shape[:-2])} and got "
                f"{tuple(x.shape[:-2])}; use reorder(index) to choose or repeat sequences, reset() for others"
            )
        before, rows = kept.shape[-2], x
        if before:
            rows, norm = torch.cat([kept, x if norm is None else norm.apply(x)], -2), None
            residual = None if residual is None else F.pad(residual, (0, 0, before, 0))
        y = compute(rows, residual, norm)
        self.count(x.shape[-2])
        last = rows[..., rows.shape[-2] - self.seen % self._tile :, :]
        self._kept = last.clone() if norm is None else norm.apply(last)
        return y[..., before:, :].contiguous()

    def count(self, n: int) -> None:
        """n rows have come, which another keeps where they are needed again."""
        self.calls += 1
        self.seen += n

    def reorder(self, index: Tensor) -> None:
        if self._kept is not None:
            self._kept = self._kept.index_select(0, index.to(self._kept.device))
