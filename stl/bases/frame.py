"""Unit-norm tight frames grown from an orthonormal transform: well conditioned at any rank from t² to t³.

At rank t² the frame is the transform itself: Walsh–Hadamard where t is a power of two, the cosine transform otherwise.
"""

import math

import torch

from stl.bases.hadamard import walsh_hadamard
from stl.basis import Basis, least_squares_encode_w, register_basis


def orthonormal_transform(size: int) -> torch.Tensor:
    """Walsh–Hadamard where `size` is a power of two, else the cosine transform; orthonormal, float64."""
    if size.bit_count() == 1:
        return walsh_hadamard(size)
    index = torch.arange(size, dtype=torch.float64)
    cosine = torch.cos(math.pi / size * (index + 0.5) * index[:, None]) * (2 / size) ** 0.5
    cosine[0] /= 2**0.5
    return cosine


def tight_frame(tile: int, rank: int) -> torch.Tensor:
    """(rank, t²) float64 with rows of norm 1 and frameᵀ·frame = (rank/t²)·I.

    Starts from copies of the orthonormal transform, with random signs on the tile's entries from the second on, and for
    the remaining rows from a random rotation: between copies alone, symmetry would leave it to rounding where the
    projections end. Then projects in turn on the tight frames and on the unit-norm rows (Tropp, Dhillon, Heath,
    Strohmer, "Designing structured tight frames via an alternating projection method", 2005).
    """
    generator = torch.Generator().manual_seed(1_000_003 * tile + rank)
    transform = torch.kron(orthonormal_transform(tile), orthonormal_transform(tile))
    copies, rest = [transform], rank % tile**2
    for _ in range(1, rank // tile**2):
        signs = torch.randint(0, 2, (tile**2,), generator=generator, dtype=torch.float64) * 2 - 1
        copies.append(transform * signs)
    rotation = torch.linalg.qr(torch.randn(tile**2, tile**2, generator=generator, dtype=torch.float64)).Q
    frame = torch.cat([*copies, rotation[:rest]])
    for _ in range(2000):
        left, singular, right = torch.linalg.svd(frame, full_matrices=False)
        if singular.max() - singular.min() < 1e-13:
            break
        frame = left @ right * (rank / tile**2) ** 0.5
        frame = frame / frame.norm(dim=1, keepdim=True)
    else:  # where the projections crawl (rank t² + 1, say)
        left, _, right = torch.linalg.svd(frame, full_matrices=False)
        frame = _rotate_to_unit_rows(left @ right * (rank / tile**2) ** 0.5)
    return frame


def _rotate_to_unit_rows(frame: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of rows, one shorter and one longer than 1, until all have norm 1; frameᵀ·frame stays as it is.

    Every rotation settles one row (Davies, Higham, "Numerically stable generation of correlation matrices", 2000).
    """
    frame = frame.clone()
    for _ in range(len(frame) - 1):
        excess = frame.square().sum(1) - 1
        low, high = int(excess.argmin()), int(excess.argmax())
        a, b = excess[low].item(), excess[high].item()
        if not (a < 0 < b):
            break
        inner = (frame[low] @ frame[high]).item()
        tangent = (inner + math.copysign((inner**2 - a * b) ** 0.5, inner)) / b
        cosine = (1 + tangent**2) ** -0.5
        x, y = frame[low].clone(), frame[high].clone()
        frame[low] = cosine * (x - tangent * y)
        frame[high] = cosine * (tangent * x + y)
    return frame / frame.norm(dim=1, keepdim=True)


@register_basis("frame", ranks=lambda tile: range(tile**2, tile**3 + 1))
def frame(tile: int, rank: int) -> Basis:
    encode_x = tight_frame(tile, rank)
    decode = encode_x * (tile**2 / rank)  # the dual frame: decodeᵀ·encode_x is the identity
    return Basis("frame", tile, rank, encode_x, least_squares_encode_w(encode_x, decode), decode)
