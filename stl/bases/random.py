"""Random orthonormal encoder and decoder, drawn from a generator that the tile and the rank seed."""

import torch

from stl.basis import Basis, least_squares_encode_w, register_basis


@register_basis("random", ranks=lambda tile: range(1, tile**3 + 1))
def random(tile: int, rank: int) -> Basis:
    """Orthonormal rows for rank ≤ t², orthonormal columns (a tight frame) scaled to rows of mean norm 1 above it."""
    generator = torch.Generator().manual_seed(1_000_003 * tile + rank)

    def orthonormal() -> torch.Tensor:
        gaussian = torch.randn(max(rank, tile**2), min(rank, tile**2), generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(gaussian).Q
        return q * (rank / tile**2) ** 0.5 if rank > tile**2 else q.T

    encode_x, decode = orthonormal(), orthonormal() * min(1.0, tile**2 / rank)
    return Basis("random", tile, rank, encode_x, least_squares_encode_w(encode_x, decode), decode)
