import pytest
import torch

from stl import Basis, SettingError, get_basis
from stl.cp.als import from_basis, to_basis
from stl.cp.discretise import discretise, is_exact_over_rationals

SIGNS = {-1.0, 0.0, 1.0}


def changed(seed: int) -> Basis:
    """Strassen's algorithm with X, W and Y in other bases: exact to rounding, and no entry is round."""
    generator = torch.Generator().manual_seed(seed)
    to = [torch.eye(2).double() + 0.4 * torch.randn(2, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    factors = [
        (torch.linalg.inv(to[i]) @ f.view(7, 2, 2) @ to[(i + 1) % 3]).reshape(7, 4)
        for i, f in enumerate(from_basis(get_basis("strassen", 2, 7)))
    ]
    return to_basis(factors)


def test_an_exact_basis_of_arbitrary_numbers_becomes_one_of_signs():
    before = changed(0)
    assert before.exact
    assert not is_exact_over_rationals(before)
    after = discretise(before)
    assert after is not None
    assert (after.name, after.tile, after.rank, after.error) == (before.name, 2, 7, 0)
    assert is_exact_over_rationals(after)
    for role in ("encode_x", "encode_w", "decode"):
        assert set(getattr(after, role).unique().tolist()) <= SIGNS
    again = discretise(before)
    assert again is not None
    assert torch.equal(again.encode_x, after.encode_x)


@pytest.mark.parametrize("seed", [3, 5])
def test_what_comes_back_is_exact_or_nothing(seed):
    after = discretise(changed(seed))
    assert after is None or is_exact_over_rationals(after)


def test_a_way_that_ends_early_gives_nothing(monkeypatch):
    monkeypatch.setattr("stl.cp.discretise.STEPS", 1)
    assert discretise(changed(0)) is None


@pytest.mark.parametrize("size", [("strassen", 2, 7), ("exact48", 4, 48)])
def test_what_is_exact_over_the_rationals_stays(size):
    basis = get_basis(*size)
    assert discretise(basis) is basis


def test_an_inexact_basis_is_refused():
    with pytest.raises(SettingError, match=r"basis 'hadamard' has error 0\.5; discretise an exact one"):
        discretise(get_basis("hadamard", 2, 4))


@pytest.mark.parametrize("role", ["encode_x", "encode_w", "decode"])
def test_one_changed_bit_is_no_longer_exact_over_the_rationals(role):
    strassen = get_basis("strassen", 2, 7)
    matrices = {name: getattr(strassen, name).clone() for name in ("encode_x", "encode_w", "decode")}
    assert is_exact_over_rationals(Basis("same", 2, 7, **matrices))
    matrices[role][0, 0] += 2**-52
    other = Basis("other", 2, 7, **matrices)
    assert other.exact  # to float64 rounding
    assert not is_exact_over_rationals(other)
