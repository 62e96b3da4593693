import pytest
import torch

from stl import get_basis
from stl.cp.als import error_and_amplification, from_basis
from stl.cp.starts import BELOW, hop, known_start, start_batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("tile", "rank"), [(1, 1), (2, 1), (2, 7), (3, 4), (3, 23), (4, 16), (4, 49)])
def test_a_batch_is_finite_and_the_same_for_the_same_seed(tile, rank):
    known = [from_basis(get_basis("products", tile, tile**3))]
    batch, again = (start_batch(tile, rank, 9, known, seeded()) for _ in range(2))
    other = start_batch(tile, rank, 9, known, seeded(1))
    for f, same, changed in zip(batch, again, other, strict=True):
        assert f.shape == (9, rank, tile**2)
        assert f.dtype == torch.float64
        assert f.isfinite().all()
        assert torch.equal(f, same)
        assert not torch.equal(f, changed)
        assert not torch.equal(hop(batch, seeded())[0], batch[0])


def test_a_known_decomposition_of_the_rank_is_among_the_starts():
    strassen = from_basis(get_basis("strassen", 2, 7))
    batch = start_batch(2, 7, 4, [strassen], seeded())
    assert error_and_amplification(batch)[0][0] == 0


def test_dropping_columns_of_an_exact_one_costs_what_the_columns_are_worth():
    exact48 = from_basis(get_basis("exact48", 4, 48))
    errors = [
        error_and_amplification([f[None] for f in known_start(exact48, 47, seeded(seed))])[0].item()
        for seed in range(10)
    ]
    worth = (exact48[0].norm(dim=1) * exact48[1].norm(dim=1) * exact48[2].norm(dim=1)).square() / 64
    assert min((worth - error).abs().min() for error in errors) < 1e-12  # those without noise


def test_a_smaller_decomposition_gets_short_random_columns():
    strassen = from_basis(get_basis("strassen", 2, 7))
    for f in known_start(strassen, 7 + BELOW, seeded()):
        assert f.shape == (11, 4)
        assert (f[7:].norm(dim=1) > 0).all()


def test_a_hop_changes_some_columns_or_all():
    batch = start_batch(3, 12, 30, [], seeded())
    scaled = hop(batch, seeded(5))
    changed = (scaled[0] - batch[0]).abs().amax(-1).gt(1e-9).sum(1)
    assert len(scaled) == 3
    assert changed.min() >= 1
