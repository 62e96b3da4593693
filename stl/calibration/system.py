"""What a layer's encoded weight makes of given rows, as a linear map, and conjugate gradients for it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stl.functional import to_tiles

DEAD = 1e-4  # of the mean square of the input, below which that of a single column of tiles is not taken at its word


class Problem:
    """The linear map from an encoded weight to the layer's output tiles on given rows, and its adjoint.

    Only what the layer puts out counts: output in padded rows or columns is cut off there, and is zero here. `inside`
    (t², 1, b) is 1 for the entries of the b columns of output tiles that are true columns.
    """

    def __init__(self, rows: Tensor, valid: Tensor, encoder: Tensor, decoder: Tensor) -> None:
        """rows (N, t, k), with zeros or copies where padded; valid (N, t), false there; encoder and decoder (r, t²)."""
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

        Then adjoint·apply is G ⊗ diag(N·power), with the G of the package's docstring. G is singular for some bases,
        and power is zero where an input is always zero: both are bounded below.
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
