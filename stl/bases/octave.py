"""`shuffle` with most channels for what the tokens of a tile have in common. Any rank from t² to 2·t², below t³.

Half of the channels read and write the mean of the tokens, a quarter the Walsh function of tokens with one change of
sign, and so on, as an octave of a wavelet has half of the coefficients of the next; the last two functions have about
equally many. Tokens beside each other are alike, and what trained layers write into the residual stream is mostly one
thing for a whole tile. Of features channels have the pairs of `shuffle`, one behind the other: error 1 − r/t³,
S = r/t³.
"""

from itertools import pairwise

import torch

from stl.bases.frame import orthonormal_transform
from stl.basis import Basis, least_squares_encode_w, register_basis


def shares(tile: int, rank: int) -> list[int]:
    """Channels of each of the `tile` functions of tokens, the smoothest first."""
    ends = [rank - (rank >> index) for index in range(tile)] + [rank]
    return [after - before for before, after in pairwise(ends)]


@register_basis("octave", ranks=lambda tile: range(tile**2, min(2 * tile**2 + 1, tile**3)))
def octave(tile: int, rank: int) -> Basis:
    functions, single = orthonormal_transform(tile), torch.eye(tile, dtype=torch.float64)
    changes = (functions[:, 1:] * functions[:, :-1] < 0).sum(1)
    of_tokens = functions[changes.argsort()].repeat_interleave(torch.tensor(shares(tile, rank)), 0)
    pairs = [(b, (b + d) % tile) for d in range(tile) for b in range(tile)]
    of_features = [pairs[channel % tile**2] for channel in range(rank)]
    encode_x = torch.stack([torch.kron(a, single[b]) for a, (b, _) in zip(of_tokens, of_features, strict=True)])
    decode = torch.stack([torch.kron(a, functions[c]) for a, (_, c) in zip(of_tokens, of_features, strict=True)])
    return Basis("octave", tile, rank, encode_x, least_squares_encode_w(encode_x, decode), decode)
